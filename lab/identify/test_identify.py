"""Claims of lab/identify/identify.py and its tools: losses whose answer is known are named; what fits nothing is not.
"""
import builtins
import json
import math

import pytest
import torch

import ipo
from lab.identify import askable, identify, verdict

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
def shifted(h): return (h - 5) ** 2 + 7
def sigmoid(c, r, rc, rr, beta=0.1): return -F.logsigmoid(beta * h_of(c, r, rc, rr)), None, None
def silently_sigmoid(c, r, rc, rr, beta=0.1, loss_type="ipo"): return sigmoid(c, r, rc, rr, beta)
def two_sigmoids(h): return -2 * F.logsigmoid(0.1 * h)
def hinge(h, beta=0.5): return F.relu(1 - beta * h)
def squared_hinge(h, beta=0.5): return F.relu(1 - beta * h) ** 2
def exponential(h, beta=0.2): return torch.exp(-beta * h)
def savage(h, beta=0.5): return torch.sigmoid(-beta * h) ** 2
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
def twice_decorated(f):
    @functools.wraps(f)
    def loss(*numbers, **more): return 2 * f(*numbers, **more)
    return loss
decorated = twice_decorated(scaled)

def of(number, f):
    """A loss of tokens: f of the number that a row's log-ratios and mask make, chosen less rejected."""
    def loss(c, r, rc, rr, mc, mr, beta=0.1): return f(number(c - rc, mc) - number(r - rr, mr), beta).mean()
    return loss
def add(x, m): return (x * m).sum(-1)
t_sum = of(add, scaled)
t_mean = of(lambda x, m: add(x, m) / m.sum(-1), lambda h, beta: (h - 1 / (2 * beta)) ** 2)
t_sigmoid = of(add, lambda h, beta: -F.logsigmoid(beta * h))
t_everything = of(lambda x, m: x.mean(-1), scaled)
t_no_mask = of(lambda x, m: x.sum(-1), scaled)
t_width = of(lambda x, m: (x * m).mean(-1), scaled)
t_late = of(lambda x, m: add(x[:, 1:], m[:, :-1]), scaled)
t_early = of(lambda x, m: add(x[:, :-1], m[:, 1:]) / m.sum(-1), scaled)
t_nonzero = of(lambda x, m: add(x, m) / (x * m != 0).sum(-1), lambda h, beta: (h - 1 / (2 * beta)) ** 2)
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


def look(file, name, tau=0.1):
    torch.manual_seed(0)
    return verdict.examine(askable.Loss(askable.load(f"{file}:{name}"), "", tau), tau)


def look_at_tokens(file, name):
    torch.manual_seed(0)
    return identify.examine_tokens(askable.load(f"{file}:{name}"), {}, 0.1)[0]


@pytest.mark.parametrize("name, is_called, tau, factor, stops, link", [
    ("ipo", "ipo", 0.1, 1, 5, "identity"), ("ipo_mean", "ipo", 0.1, 1, 5, "identity"),
    ("misread", "ipo scaled", 0.01, 0.01, 50, "identity"), ("scaled", "ipo scaled", 0.1, 0.01, 5, "identity"),
    ("twice", "ipo scaled", 0.1, 2, 5, "identity"), ("half_target", "ipo", 0.05, 1, 10, "identity"),
    ("tiny", "ipo scaled", 0.1, 1e-8, 5, "identity"), ("shifted", "ipo", 0.1, 1, 5, "identity"),
    ("sigmoid", "dpo", 0.1, 1, None, "logit"), ("silently_sigmoid", "dpo", 0.1, 1, None, "logit"),
    ("two_sigmoids", "dpo", 0.1, 2, None, "logit"), ("hinge", "hinge", 0.5, 1, 2, "sign"),
    ("squared_hinge", "squared hinge", 0.5, 1, 2, "identity"),
    ("decorated", "ipo scaled", 0.1, 0.02, 5, "identity"), ("far", "ipo", 1e-4, 1, 5000, "identity"),
    ("exponential", "exponential", 0.2, 1, None, "logit"), ("savage", "savage", 0.5, 1, None, "logit"),
    ("soft", "ipo", 0.1, 1, 5, "identity"), ("hard", "ipo", 0.1, 1, 5, "identity")])
def test_known_losses_are_named(file, name, is_called, tau, factor, stops, link):
    """Worked out by hand: target, beta, and the minimiser of p f(h) + (1-p) f(-h)."""
    report = look(file, name)
    assert report["margin_only"] and report["sign"] == "right"
    assert report["verdict"] == is_called and report["tau"] == pytest.approx(tau, rel=1e-6)
    assert report["factor"] == pytest.approx(factor, rel=1e-6)
    assert report["link"] == link
    assert report["stops_at"] == (stops if stops is None else pytest.approx(stops, abs=0.1))


@pytest.mark.parametrize("name, is_called, convex, link", [
    ("ipo", "ipo", True, "identity"), ("dpo", "dpo", True, "logit"), ("savage", "savage", False, "logit"),
    ("exponential", "exponential", True, "logit"), ("squared_hinge", "squared hinge", True, "identity"),
    ("slic", "hinge", True, "sign"), ("exo", "none", False, "identity"), ("robust", "none", True, "none"),
    ("discopop", "none", False, "none"), ("simpo", "none", True, "none"), ("rebel", "none", False, "none")])
def test_losses_of_the_lab_are_named(name, is_called, convex, link, monkeypatch):
    """The links are those of lab/methods/losses.py's table; what is no f(beta h) of the known ones is none."""
    monkeypatch.setattr(ipo, "psi", lambda q: q)
    monkeypatch.setattr(ipo, "LOSSES", dict(ipo.LOSSES))
    monkeypatch.setattr(ipo, "WORTH", dict(ipo.WORTH))
    from lab.methods import losses
    function = ipo.LOSSES[name] if name in ("ipo", "dpo") else getattr(losses, name)
    report = verdict.examine(askable.Loss(function, "", 0.5), 0.5)
    assert (report["verdict"], report["link"]) == (is_called, link)
    assert report["soft_labels"] == "honoured"
    if is_called != "none":
        assert report["tau"] == pytest.approx(0.5) and report["convex"] == convex


@pytest.mark.parametrize("name", [
    "wave", "line", "quartic", "huber", "exponential_plus", "floored", "rippled", "nan_at_0"])
def test_nothing_is_guessed(file, name):
    """No square and no f(beta h): also what is one but for a constant, far out, or at 0."""
    report = look(file, name)
    assert (report["verdict"], report["tau"], report["largest_difference"]) == ("none", None, None)


def test_only_functions_of_the_margin_are(file):
    """A loss without reference, and IPO plus a likelihood, change while h stays."""
    assert not look(file, "no_reference")["margin_only"] and not look(file, "plus_likelihood")["margin_only"]


def test_a_wrong_sign_is_named(file):
    """-log s(-beta h) and (-h - 5)^2 push the chosen response down: their slopes at 0 are positive."""
    report = look(file, "flipped")
    assert report["slope_at_0"] == pytest.approx(0.05) and report["sign"].startswith("wrong")
    report = look(file, "flipped_ipo")
    assert report["tau"] == pytest.approx(-0.1) and report["sign"].startswith("wrong")
    assert "its sign is wrong" in identify.sentence(report)
    assert look(file, "slope_nan_at_0")["sign"].startswith("unknown")


def test_soft_labels_are_honoured_or_ignored(file):
    """One of two losses of (h, p, tau) reads p."""
    assert look(file, "soft")["soft_labels"] == "honoured"
    assert look(file, "hard")["soft_labels"] == "ignored"


def test_overflow_is_seen(file):
    """exp(.2 x 10^4) overflows in float32; a square does not."""
    assert not look(file, "exponential")["finite_float32"]
    assert look(file, "ipo")["finite_float32"] and not look(file, "nan_at_0")["finite_float32"]


def test_the_minimiser_in_a_world_is_pi_star(file):
    """IPO's exact minimiser in bt is pi* of the identity at its own tau (eq. 7), DPO's that of logit."""
    loss = askable.Loss(askable.load(f"{file}:ipo"), "beta", 0.1)
    assert verdict.nearest(loss, "bt")["identity"] == {"tau": 0.1, "kl": pytest.approx(0, abs=1e-4)}
    loss = askable.Loss(askable.load(f"{file}:sigmoid"), "beta", 0.1)
    assert verdict.nearest(loss, "bt")["logit"] == {"tau": 0.1, "kl": pytest.approx(0, abs=1e-4)}


def test_the_minimiser_of_means_is_no_pi_star(file, monkeypatch):
    """Of means it is another policy; it would be pi* if all responses were of one length."""
    loss = askable.Loss(askable.load(f"{file}:ipo"), "beta", 0.2)
    assert verdict.nearest(loss, "bt", mean=True)["identity"]["kl"] > 1e-3

    class Even(verdict.data.World):
        def __init__(self, name):
            super().__init__(name)
            rows = torch.arange(len(self.pairs.start))
            self.pairs.start, self.pairs.prompt_len = 5 * rows, 3 + 0 * rows[1:]  # two tokens each
    monkeypatch.setattr(verdict.data, "World", Even)
    nearest = verdict.nearest(loss, "bt", mean=True)["identity"]
    assert nearest == {"tau": 0.1, "kl": pytest.approx(0, abs=1e-4)}


@pytest.mark.parametrize("name, kind, fixture", [
    ("t_sum", "sum", 0.1156), ("t_mean", "mean", 19.8025), ("t_sigmoid", "sum", 0.616344),
    ("t_everything", "mean, prompt and padding, too", None),
    ("t_no_mask", "sum, prompt and padding, too", None),
    ("t_width", "sum over the padded width", None), ("t_late", "sum, one token late", None),
    ("t_early", "mean, one token early", None), ("t_saturated", "sum", 0),
    ("t_nonzero", "mean where the ratio is not 0", 19.067778), ("t_simpo", "mean", None)])
def test_the_number_of_a_row_is_found(file, name, kind, fixture):
    """By construction of each loss; the fixture's costs are (1.6 - 5)^2, (.55 - 5)^2 and so on."""
    report = look_at_tokens(file, name)
    assert report["tokens"] == kind
    assert fixture is None or report["fixture"] == pytest.approx(fixture, rel=1e-5)


@pytest.mark.parametrize("name", ["t_root", "t_first", "t_clamped", "t_nothing", "t_both"])
def test_no_number_is_guessed(file, name):
    """The root of the length, the first token alone, cut ratios, nothing, a sum and a mean: no kind fits."""
    report = look_at_tokens(file, name)
    assert (report["tokens"], report["verdict"], report["margin_only"]) == ("neither", "none", False)
    assert min(report["token_differences"].values()) > 0.01
    assert "neither sum nor mean" in identify.sentence(report)


def test_the_rest_of_the_screen_is_of_that_number(file):
    """Means get the square's verdict, with what it is of; a loss without reference is none of the margin."""
    report = look_at_tokens(file, "t_mean")
    assert report["verdict"] == "ipo" and report["tau"] == pytest.approx(0.1)
    assert report["stops_at"] == pytest.approx(5)
    assert report["finite_bfloat16"] and "MEANS over tokens" in identify.sentence(report)
    assert "MEANS" not in identify.sentence(look_at_tokens(file, "t_sum"))
    assert report["token_slopes"] == [[0, 0, *4 * [-0.5], 0], [0, 0, 1, 1, 0, 0, 0]]
    report = look_at_tokens(file, "t_simpo")
    assert not report["margin_only"] and report["tokens"] == "mean"
    report = look_at_tokens(file, "t_nonzero")
    assert math.isnan(report["value_at_0"]) and report["verdict"] == "none"
    assert identify.sentence(report).startswith("not finite at h = 0")


def test_the_command(file, tmp_path, capsys, monkeypatch):
    """One screen or one object; the keyword's own default is the tau; the rest ends in one line."""
    out = ["--out", str(tmp_path / "o")]
    assert identify.main([f"{file}:misread", "--tau", "beta", *out]) == 0
    screen = capsys.readouterr().out
    assert "it asks for 50 nats, eq. 17 at the tau named for 5" in screen
    assert "'bt': {'identity': {'tau': 0.01, 'kl': " in screen
    monkeypatch.setattr(verdict, "nearest", lambda loss, world, mean: None)
    assert identify.main([f"{file}:ipo", "--tau", "beta=0.5", "--json", *out]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "ipo" and math.isclose(report["tau"], 0.5, rel_tol=1e-6)
    for bad in (f"{file}:nothing", "no_such_module:f", "json:dumps", f"{file}:number", f"{file}:t_sum", "",
                "--odd", f"{file}:ipo --tau gamma", f"{file}:ipo --tau beta=x", f"{file}:t_five --tokens"):
        assert identify.main([*bad.split(), *out]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_command_of_tokens(file, tmp_path, capsys, monkeypatch):
    """The keyword reaches a loss of tokens; means are told apart where the minimiser is looked for."""
    asked = []
    monkeypatch.setattr(verdict, "nearest", lambda loss, world, mean: asked.append((world, mean)))
    out = ["--tokens", "--tau", "beta=0.5", "--json", "--out", str(tmp_path / "o")]
    for name, means in (("t_sum", [False]), ("t_mean", [True]), ("t_late", []), ("t_simpo", [])):
        flags = out if name != "t_simpo" else [out[0], *out[3:]]
        assert identify.main([f"{file}:{name}", *flags]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [mean for world, mean in asked if world == "bt"] == means
        assert name == "t_simpo" or report["tau"] == pytest.approx(0.5)
        asked.clear()
    reports = []
    for name in ("t_nonzero", "t_nothing"):
        assert identify.main([f"{file}:{name}", "--tokens", "--out", str(tmp_path / "o")]) == 0
        text = (tmp_path / "o" / "report.json").read_text()
        reports.append(json.loads(text, parse_constant=pytest.fail))  # JSON knows neither nan nor infinity
    assert reports[0]["value_at_0"] is None and reports[1]["token_differences"]["sum"] is None


def test_without_trl_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    """As on a machine that has the core's requirements alone."""
    def refuse(name, *more, **others):
        if name == "trl" or "trl_loss" in (more[2] or ()):
            raise ImportError("No module named 'trl'")
        return real(name, *more, **others)
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert identify.main(["--trl", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lab/requirements.txt" in error


@pytest.mark.parametrize("loss_type, kind, is_called, fixture", [
    ("ipo", "mean", "ipo", 19.8025), ("sigmoid", "sum", "dpo", 0.616344), ("hinge", "sum", "hinge", 0.84),
    ("sppo_hard", "sum", None, 35.36)])
def test_trl(loss_type, kind, is_called, fixture):
    """TRL's own trainer at log-ratios whose costs are worked out by hand, with its own beta of .1."""
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    from lab.identify import trl_loss
    loss = trl_loss.load(loss_type, None)
    assert loss.real == pytest.approx(fixture, rel=1e-5)
    report, _ = identify.examine_tokens(loss, {}, loss.beta)
    assert report["tokens"] == kind and report["fixture"] == pytest.approx(fixture, rel=1e-5)
    assert report["margin_only"] == bool(is_called)
    if is_called:
        assert report["verdict"] == is_called and report["tau"] == pytest.approx(0.1)


def test_the_command_of_trl(tmp_path, capsys, monkeypatch):
    """--tau beta=VALUE reaches TRL; what TRL refuses ends in one line."""
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.setattr(verdict, "nearest", lambda loss, world, mean: None)
    out = ["--out", str(tmp_path / "o")]
    assert identify.main(["--trl", "--loss_type", "sigmoid", "--tau", "beta=0.5", "--json", *out]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["verdict"], report["tokens"], report["tau"]) == ("dpo", "sum", pytest.approx(0.5))
    for bad in (["--loss_type", "dpo"], ["--loss_type", "exo_pair"], ["--tau", "tau"]):
        assert identify.main(["--trl", *bad, *out]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line[:9] for line in lines if "identify" in line] == ["identify:"]


def test_a_stand_in_that_trl_does_not_resemble_is_refused(monkeypatch):
    """If the hand-made models and the stand-in cost differently, nothing is reported."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from lab.identify import trl_loss
    real = trl_loss.Given.__call__

    def without_mask(self, labels, **more):
        return real(self, torch.ones_like(labels), **more)
    monkeypatch.setattr(trl_loss.Given, "__call__", without_mask)
    with pytest.raises(askable.Unusable, match="from models"):
        trl_loss.load("sigmoid", None)
