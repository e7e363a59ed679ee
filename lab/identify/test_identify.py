"""lab.identify: losses whose answer is known are named; what fits nothing is not."""
import math
import sys

import pytest
import torch

import ipo
from lab.common import start
from lab.identify import __main__ as identify
from lab.identify import margin, tokens

SOURCE = '''
import functools
import torch, torch.nn.functional as F
def h_of(c, r, rc, rr): return (c - rc) - (r - rr)
def ipo(c, r, rc, rr, beta=0.1): return (h_of(c, r, rc, rr) - 1 / (2 * beta)) ** 2
def ipo_mean(c, r, rc, rr, beta=0.1): return ((h_of(c, r, rc, rr) - 1 / (2 * beta)) ** 2).mean()
def misread(c, r, rc, rr, beta=0.1): return (beta * h_of(c, r, rc, rr) - 1 / (2 * beta)) ** 2
def scaled(h, beta=0.1): return (beta * h - 0.5) ** 2
def twice(h, beta=0.1): return 2 * (h - 1 / (2 * beta)) ** 2
def half_target(h, beta=0.1): return (h - 1 / beta) ** 2
def tiny(h): return 1e-8 * (h - 5) ** 2
def far(h): return (h - 5000) ** 2
def float32(c, r, rc, rr): return (h_of(c, r, rc, rr).float() - 5) ** 2
def float32_sigmoid(c, r, rc, rr): return sigmoid(*[x.float() for x in (c, r, rc, rr)])
def shifted(h): return (h - 5) ** 2 + 7
def sigmoid(c, r, rc, rr, beta=0.1): return -F.logsigmoid(beta * h_of(c, r, rc, rr)), None, None
def silently_sigmoid(c, r, rc, rr, beta=0.1, loss_type="ipo"): return sigmoid(c, r, rc, rr, beta)
def two_sigmoids(h): return -2 * F.logsigmoid(0.1 * h)
def hinge(h, beta=0.5): return F.relu(1 - beta * h)
def squared_hinge(h, beta=0.5): return F.relu(1 - beta * h) ** 2
def exponential(h, beta=0.2): return torch.exp(-beta * h)
def flipped(h): return -F.logsigmoid(-0.1 * h)
def flipped_ipo(h): return (-h - 5) ** 2
def no_reference(c, r, rc, rr): return -F.logsigmoid(0.1 * (c - r))
def plus_likelihood(c, r, rc, rr): return (h_of(c, r, rc, rr) - 5) ** 2 - 0.1 * c
def wave(h): return torch.sin(h)
def line(h): return -h
def quartic(h): return (h - 5) ** 4
def huber(h): return F.huber_loss(h, torch.full_like(h, 5), reduction="none", delta=20.0)
def exponential_plus(h): return torch.exp(-0.2 * h) + 1
def floored(h): return torch.exp(-0.2 * h.clamp(max=20))
def rippled(h): return -F.logsigmoid(0.1 * h) + 0.004 * torch.sin(h) ** 2
def nan_at_0(h): return torch.where(h == 0, torch.nan, (h - 5) ** 2)
def slope_nan_at_0(h): return (h - 5) ** 2 + 0 * h.abs().sqrt()
def soft(h, p, tau): return (h - (p - 0.5) / tau) ** 2
def hard(h, p, tau): return (h - 0.5 / tau) ** 2
def number(h): return ((h - 5) ** 2).item()
def needs_beta(h, beta): return (h - 1 / (2 * beta)) ** 2
def twice_decorated(f):
    @functools.wraps(f)
    def loss(*numbers, **more): return 2 * f(*numbers, **more)
    return loss
decorated = twice_decorated(scaled)

def of(number, f):
    """A loss of tokens: f of the number that a row's log-ratios and mask make, chosen less rejected."""
    def loss(c, r, rc, rr, mc, mr, beta=0.1):
        return f(number(c - rc, mc) - number(r - rr, mr), beta).mean()
    return loss
def add(x, m): return (x * m).sum(-1)
t_sum = of(add, scaled)
t_mean = of(lambda x, m: add(x, m) / m.sum(-1), lambda h, beta: (h - 1 / (2 * beta)) ** 2)
t_float32 = of(add, lambda h, beta: (h.float() - 1 / (2 * beta)) ** 2)
t_sigmoid = of(add, lambda h, beta: -F.logsigmoid(beta * h))
t_everything = of(lambda x, m: x.mean(-1), scaled)
t_no_mask = of(lambda x, m: x.sum(-1), scaled)
t_width = of(lambda x, m: (x * m).mean(-1), scaled)
t_late = of(lambda x, m: add(x[:, 1:], m[:, :-1]), scaled)
t_early = of(lambda x, m: add(x[:, :-1], m[:, 1:]) / m.sum(-1), scaled)
t_nonzero = of(lambda x, m: add(x, m) / (x * m != 0).sum(-1),
               lambda h, beta: (h - 1 / (2 * beta)) ** 2)
t_root = of(lambda x, m: add(x, m) / m.sum(-1) ** 0.5, scaled)
t_first = of(lambda x, m: x[:, 2], scaled)
t_clamped = of(lambda x, m: add(x.clamp(-1, 1), m), scaled)
t_nothing = of(lambda x, m: 0 * x.sum(-1), scaled)
t_saturated = of(add, lambda h, beta: F.relu(1 - 50 * h))
def mean(x, m): return add(x, m) / m.sum(-1)
def t_simpo(c, r, rc, rr, mc, mr): return -F.logsigmoid(2 * (mean(c, mc) - mean(r, mr)) - 1)
def t_both(c, r, rc, rr, mc, mr): return (add(c - rc, mc) - mean(r - rr, mr) - 5) ** 2
def t_five(c, r, rc, rr, mc): return add(c, mc)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("identify") / "losses_of_mine.py"
    path.write_text(SOURCE)
    return path


def look(file, name, **more):
    function = margin.load(f"{file}:{name}")
    if name in ("soft", "hard"):
        function, _ = identify.with_tau(function, "tau=0.1")
    return margin.examine(margin.Loss(function), 0.1)


def look_at_tokens(file, name):
    return identify.of_tokens(margin.load(f"{file}:{name}"), 0.1)


@pytest.mark.parametrize("name, is_called, tau, factor, stops, link", [
    ("ipo", "ipo", 0.1, 1, 5, "identity"),
    ("ipo_mean", "ipo", 0.1, 1, 5, "identity"),
    ("misread", "ipo scaled", 0.01, 0.01, 50, "identity"),
    ("scaled", "ipo scaled", 0.1, 0.01, 5, "identity"),
    ("twice", "ipo scaled", 0.1, 2, 5, "identity"),
    ("half_target", "ipo", 0.05, 1, 10, "identity"),
    ("tiny", "ipo scaled", 0.1, 1e-8, 5, "identity"),
    ("shifted", "ipo", 0.1, 1, 5, "identity"),
    ("float32", "ipo", 0.1, 1, 5, "identity"),
    ("float32_sigmoid", "dpo", 0.1, 1, math.nan, "logit"),
    ("sigmoid", "dpo", 0.1, 1, math.nan, "logit"),
    ("silently_sigmoid", "dpo", 0.1, 1, math.nan, "logit"),
    ("two_sigmoids", "dpo", 0.1, 2, math.nan, "logit"),
    ("hinge", "hinge", 0.5, 1, 2, "sign"),
    ("squared_hinge", "squared hinge", 0.5, 1, 2, "identity"),
    ("decorated", "ipo scaled", 0.1, 0.02, 5, "identity"),
    ("far", "ipo", 1e-4, 1, 5000, "identity"),
    ("soft", "ipo", 0.1, 1, 5, "identity"),
    ("hard", "ipo", 0.1, 1, 5, "identity")])
def test_known_losses_are_named(file, name, is_called, tau, factor, stops, link):
    """Worked out by hand: target, beta, and the minimiser of p f(h) + (1-p) f(-h)."""
    report = look(file, name)
    assert report["margin alone"] and report["slope at h = 0"] < 0
    assert report["verdict"] == is_called
    assert report["tau"] == pytest.approx(tau, rel=1e-6)
    assert report["factor"] == pytest.approx(factor, rel=1e-6)
    assert report["link"] == link
    assert report["stops at"] == pytest.approx(stops, abs=0.1, nan_ok=True)


@pytest.mark.parametrize("loss, is_called, link", [
    (ipo.ipo_loss, "ipo", "identity"),
    (ipo.dpo_loss, "dpo", "logit")])
def test_the_cores_losses_are_named(loss, is_called, link):
    function, tau = identify.with_tau(loss, "tau=0.5")
    report = margin.examine(margin.Loss(function), tau)
    assert (report["verdict"], report["link"]) == (is_called, link)
    assert report["takes p"] is True
    assert report["tau"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", [
    "wave", "line", "quartic", "huber", "exponential", "exponential_plus", "floored", "rippled", "nan_at_0"])
def test_nothing_is_guessed(file, name):
    """No square and no f(beta h): also what is one but for a constant, far out, or at 0."""
    report = look(file, name)
    assert (report["verdict"], report["tau"]) == ("none", None)


@pytest.mark.parametrize("name", ["no_reference", "plus_likelihood"])
def test_only_functions_of_the_margin_are(file, name):
    """A loss without reference, and IPO plus a likelihood, change while h stays."""
    assert not look(file, name)["margin alone"]


def test_a_wrong_sign_is_named(file):
    """-log s(-beta h) and (-h - 5)^2 push the chosen response down: their slopes at 0 are positive."""
    assert look(file, "flipped")["slope at h = 0"] == pytest.approx(0.05)
    report = look(file, "flipped_ipo") | {"over tokens": "sum"}
    assert report["tau"] == pytest.approx(-0.1)
    assert "its sign is wrong" in identify.sentence(report)


def test_soft_labels_are_honoured_or_ignored(file):
    """One of two losses of (h, p, tau) reads p."""
    assert look(file, "soft")["takes p"] is True
    assert look(file, "hard")["takes p"] == "and ignores it"


def test_the_link_is_of_any_loss_of_the_margin(file):
    """An exponential has no name here, but DPO's optimum; a quartic has another's."""
    assert look(file, "exponential")["link"] == "logit"
    assert look(file, "quartic")["link"] == "none"


@pytest.mark.parametrize("name, kind", [
    ("t_sum", "sum"),
    ("t_float32", "sum"),
    ("t_mean", "mean"),
    ("t_sigmoid", "sum"),
    ("t_everything", "mean, prompt and padding, too"),
    ("t_no_mask", "sum, prompt and padding, too"),
    ("t_late", "sum, one token late"),
    ("t_early", "mean, one token early"),
    ("t_saturated", "sum"),
    ("t_nonzero", "mean where the ratio is not 0"),
    ("t_simpo", "mean")])
def test_the_number_of_a_row_is_found(file, name, kind):
    """By construction of each loss."""
    found, off = tokens.find(margin.load(f"{file}:{name}"))
    assert found.name == kind and off < 1e-3


@pytest.mark.parametrize("name", ["t_root", "t_first", "t_clamped", "t_nothing", "t_both", "t_width"])
def test_no_number_is_guessed(file, name):
    """No kind fits: the root of the length, the first token, cut ratios, nothing, both, the padded width."""
    report = look_at_tokens(file, name)
    assert (report["over tokens"], report["verdict"]) == ("neither", "none")
    assert "neither sum nor mean" in identify.sentence(report)


def test_means_are_named_in_the_first_line(file):
    """The square's verdict, with what it is of."""
    report = look_at_tokens(file, "t_mean")
    assert report["verdict"] == "ipo" and report["tau"] == pytest.approx(0.1)
    assert "MEANS over tokens" in identify.sentence(report)
    assert "MEANS" not in identify.sentence(look_at_tokens(file, "t_sum"))


def test_a_loss_of_tokens_without_reference_is_none_of_the_margin(file):
    report = look_at_tokens(file, "t_simpo")
    assert not report["margin alone"] and report["over tokens"] == "mean"


def test_what_is_not_finite_where_training_starts_is_said_first(file):
    report = look_at_tokens(file, "t_nonzero")
    assert math.isnan(report["value at h = 0"]) and report["verdict"] == "none"
    assert identify.sentence(report).startswith("not finite at h = 0")


def command(capsys, *argv):
    """(status, stdout, stderr) of the program."""
    status = start.main("identify", identify.run, [*map(str, argv)])
    return status, *capsys.readouterr()


def test_the_first_line_is_the_verdict(file, capsys):
    """The argument's own default is the tau; the rest is a name and a value a line."""
    status, out, _ = command(capsys, f"{file}:misread", "--tau", "beta")
    first, *rest = out.splitlines()
    assert status == 0
    assert first == ("this is IPO with tau = 0.01, times 0.01: it asks for 50 nats, "
                     "eq. 17 at the tau named for 5")
    assert "  stops at                50" in rest
    assert not any("{" in line for line in rest)


@pytest.fixture
def page(quoted):
    """{flags: the first line} of the commands in the README."""
    lines = quoted["python -m lab.identify"]
    flags = [line.removeprefix("$ python -m lab.identify ") for line in lines[::2]]
    return dict(zip(flags, lines[1::2], strict=True))


def test_the_readme_quotes_the_first_lines(file, page, capsys):
    """Of the commands without --trl; mine.py has the misreading."""
    for flags, first in page.items():
        if "--trl" not in flags:
            argv = flags.replace("mine.py:loss", f"{file}:misread").split()
            assert command(capsys, *argv)[1].splitlines()[0] == first


@pytest.mark.parametrize("flags", ["FILE:ipo", "FILE:t_mean --tokens"])
def test_the_tau_that_is_named_reaches_the_loss(file, flags, capsys):
    """Of one number, and of tokens."""
    _, out, _ = command(capsys, *flags.replace("FILE", str(file)).split(), "--tau", "beta=0.5")
    assert out.startswith("this is IPO with tau = 0.5")


@pytest.mark.parametrize("flags, says", [
    ("", "name a loss as module:function"),
    ("FILE:nothing", "write module:function"),
    ("no_such_module:f", "write module:function"),
    ("FILE:number", "use tensors alone"),
    ("FILE:t_sum", "--tokens"),
    ("FILE:needs_beta", "--tau NAME=VALUE"),
    ("FILE:needs_beta --tau beta", "--tau beta=0.1"),
    ("FILE:ipo --tau 0.1", "write NAME=VALUE"),
    ("FILE:ipo --tau gamma", "arguments are c, r, rc, rr, beta"),
    ("FILE:ipo --tau beta=x", "write --tau beta=0.1"),
    ("FILE:ipo --loss_type ipo", "nothing without --trl"),
    ("FILE:ipo --trl", "no other loss"),
    ("FILE:t_five --tokens", "six"),
    ("--odd", "--odd")])
def test_what_cannot_be_asked_is_one_line_with_a_remedy(file, flags, says, capsys):
    status, out, err = command(capsys, *flags.replace("FILE", str(file)).split())
    assert status == 2 and not out
    assert err.startswith("identify: ") and err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("text, says", [
    ("raise SystemExit(7)", "exits.py:loss cannot be used (SystemExit: 7); write module:function"),
    ("def loss(h): raise SystemExit(7)", "the loss cannot be computed: 7")])
def test_a_file_that_ends_the_process_is_one_line(text, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exits.py").write_text(text)
    status, _, err = command(capsys, "exits.py:loss")
    assert status == 2
    assert says in err and err.count("\n") == 1


def test_without_trl_one_line_says_what_to_install(capsys, monkeypatch):
    """As on a machine that has the core's requirements alone."""
    monkeypatch.setitem(sys.modules, "trl", None)
    status, _, err = command(capsys, "--trl")
    assert status == 2
    assert err.count("\n") == 1 and "lab/requirements.txt" in err


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("datasets", reason="datasets is not installed")
    return pytest.importorskip("trl", reason="TRL is not installed")


def cost_at_known_ratios(loss):
    """Where log-ratios are .5 .25 .25 0 and -.2 -.4: the margin is 1.6 of sums and .55 of means."""
    mask = tokens.masks((4, 2), 7)
    reference = torch.full((2, 1, 7), -2.0)
    policy = reference.clone()
    policy[0, 0, 2:5] += torch.tensor([0.5, 0.25, 0.25])
    policy[1, 0, 2:4] -= torch.tensor([0.2, 0.4])
    return loss(*policy, *reference, *mask[:, None]).item()


@pytest.mark.parametrize("loss_type, kind, is_called, cost", [
    ("ipo", "mean", "ipo", 19.8025),
    ("sigmoid", "sum", "dpo", 0.616344),
    ("hinge", "sum", "hinge", 0.84)])
def test_trl(trl, page, loss_type, kind, is_called, cost):
    """TRL's own trainer with its own beta of .1: (.55 - 5)^2, -log s(.16) and 1 - .16.

    What the README quotes is what is said.
    """
    loss = tokens.of_trl(loss_type)
    assert cost_at_known_ratios(loss) == pytest.approx(cost, rel=1e-5)
    report = identify.of_tokens(*identify.with_tau(loss, "beta"))
    assert report["over tokens"] == kind
    assert report["verdict"] == is_called and report["tau"] == pytest.approx(0.1)
    said = identify.sentence(report)
    assert page.get(f"--trl --loss_type {loss_type}", said) == said


def test_a_loss_of_trl_that_is_none_of_the_margin(trl):
    """sppo_hard squares each response's own log-ratio: (1 - 5)^2 + (-.6 + 5)^2."""
    loss = tokens.of_trl("sppo_hard")
    assert cost_at_known_ratios(loss) == pytest.approx(35.36, rel=1e-5)
    assert not identify.of_tokens(loss, None)["margin alone"]


def token_logp(gpt2, ids):  # (R,T) -> (R,T-1)
    logp = gpt2(ids).logits[:, :-1].log_softmax(-1)
    return logp.gather(2, ids[:, 1:, None])[..., 0].detach()


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid"])
def test_the_stand_in_costs_what_models_cost(trl, loss_type):
    """Two random GPT-2s through TRL's tokens, collator, head and reference; and their log-probs."""
    made = tokens.trainer(loss_type)
    batch = made.data_collator(list(made.train_dataset))
    due = made.compute_loss(made.model.eval(), batch).item()
    ids, mask = batch["input_ids"], batch["completion_mask"]
    policy, reference = token_logp(made.model, ids), token_logp(made.ref_model, ids)
    loss = tokens.of_trl(loss_type)
    found = loss(*policy.chunk(2), *reference.chunk(2), *mask[:, 1:].chunk(2))
    assert found.item() == pytest.approx(due, rel=1e-4)


def test_what_trl_refuses_is_one_line(trl, capsys):
    for bad in (["--loss_type", "exo_pair"], ["--tau", "tau"]):
        status, _, err = command(capsys, "--trl", *bad)
        assert status == 2
        assert [line[:9] for line in err.splitlines() if "identify" in line] == ["identify:"]
