"""Claims of lab/methods/losses.py: values, slopes, links, large margins, and what a run of the command does.
"""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import ipo
from lab.methods import losses

FAST = ["--steps", "3", "--sft_steps", "3", "--pairs", "300", "--batch_size", "32", "--log_every", "3"]
SLOPES = {  # at h = 0, p = 1, in units of tau, worked out by hand
    "slic": -1, "squared_hinge": -2, "exponential": -1, "savage": -1 / 4, "robust": -1 / 2 / 0.8,
    "discopop": 5 * (1 - math.log(2)) - 3 / 4, "exo": math.log(0.001 / 0.999) / 4,
    "simpo": -1 / (1 + math.exp(-0.1))}
START = {
    "slic": 1, "squared_hinge": 1, "exponential": 1, "savage": 1 / 4, "robust": math.log(2),
    "discopop": (1 + math.log(2)) / 2, "exo": -math.log(2) - math.log(0.001 * 0.999) / 2,
    "simpo": math.log(1 + math.exp(0.1))}


def f_slic(z):
    return np.maximum(0, 1 - z)


def f_exo(z):
    won = 1 / (1 + np.exp(-z))
    return won * np.log(won / 0.999) + (1 - won) * np.log((1 - won) / 0.001)


def f_discopop(z):
    m = 1 / (1 + np.exp(-z / 0.05))
    return (1 - m) * np.log1p(np.exp(-z)) + m * np.exp(-z)


def f_robust(z):
    return (0.9 * np.log1p(np.exp(-z)) - 0.1 * np.log1p(np.exp(z))) / 0.8


NUMPY = {  # f(z) of a certain pair, written anew
    "slic": f_slic, "squared_hinge": lambda z: f_slic(z) ** 2, "exponential": lambda z: np.exp(-z),
    "savage": lambda z: (1 + np.exp(z)) ** -2.0, "discopop": f_discopop, "robust": f_robust, "exo": f_exo,
    "simpo": lambda z: np.log1p(np.exp(0.1 - z))}
FUNCTIONS = {loss.__name__: loss for loss in losses.NEW}


def value_and_slope(name, h, p, tau=1.0, dtype=torch.float64):
    h = torch.tensor(h, dtype=dtype, requires_grad=True)
    loss = FUNCTIONS[name](h, torch.tensor(p, dtype=dtype), tau)
    loss.sum().backward()
    return loss.detach(), h.grad


def test_every_loss_stands_in_the_core():
    assert FUNCTIONS.keys() - {"rebel"} == NUMPY.keys() == SLOPES.keys() == START.keys()
    assert set(ipo.LOSSES) >= {"ipo", "dpo", *FUNCTIONS}
    assert FUNCTIONS.keys() - ipo.WORTH.keys() == {"discopop", "simpo"}


@pytest.mark.parametrize("name", NUMPY)
def test_family_against_numpy(name):
    """p f(tau h) + (1-p) f(-tau h): linear in p; swapping responses and probability changes nothing."""
    rng = np.random.default_rng(0)
    h, p, tau = rng.normal(0, 3, 50), rng.random(50), 0.7
    ours = FUNCTIONS[name](torch.tensor(h), torch.tensor(p), tau)
    assert np.allclose(ours.numpy(), p * NUMPY[name](tau * h) + (1 - p) * NUMPY[name](-tau * h))
    assert torch.allclose(ours, FUNCTIONS[name](torch.tensor(-h), torch.tensor(1 - p), tau))


def test_rebel_is_the_squared_target_of_logit(monkeypatch):
    """(h - (r - r')/tau)^2 for p = s(r - r'): what ipo_loss is when Psi is logit."""
    monkeypatch.setattr(ipo, "psi", torch.logit)
    gap, h = torch.tensor([0.3, -2.0, 4.0]).double(), torch.tensor([1.0, 0.5, -3.0]).double()
    ours = losses.rebel(h, gap.sigmoid(), 0.5)
    assert torch.allclose(ours, (h - gap / 0.5) ** 2)
    assert torch.allclose(ours, ipo.ipo_loss(h, gap.sigmoid(), 0.5))


@pytest.mark.parametrize("name", SLOPES)
def test_value_and_slope_of_each_loss_at_the_start(name):
    """At pi = ref; DiscoPOP's slope is positive, so its first step leads away from the chosen response."""
    value, slope = value_and_slope(name, [0.0], [1.0], tau=0.3)
    assert value.item() == pytest.approx(START[name], rel=1e-9)
    assert slope.item() == pytest.approx(0.3 * SLOPES[name], rel=1e-9)


def test_discopop_golden_numbers():
    """Value .8466 and slope +.784 at z = 0."""
    value, slope = value_and_slope("discopop", [0.0], [1.0])
    assert value.item() == pytest.approx(0.8466, abs=5e-5) and slope.item() == pytest.approx(0.784, abs=5e-4)


def argmin(name, p):
    """The z that minimises the loss of a pair preferred with probability p, on a grid of 1/1000."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    return z[ipo.LOSSES[name](z, torch.tensor(p, dtype=torch.float64), 1.0).argmin()].item()


@pytest.mark.parametrize("p", [0.3, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("name", ["ipo", "dpo", *sorted(FUNCTIONS.keys() - {"robust", "discopop", "simpo"})])
def test_population_link_of_each_loss(name, p, monkeypatch):
    """argmin of p f(z) + (1-p) f(-z) is what ipo.WORTH says, up to a constant; closed forms written anew."""
    monkeypatch.setattr(ipo, "psi", lambda q: q)
    logit = math.log(p / (1 - p))
    link = {"ipo": p - 0.5, "exponential": logit / 2, "slic": math.copysign(1, p - 0.5),
            "squared_hinge": 2 * p - 1, "exo": (2 * p - 1) * math.log(999)}.get(name, logit)
    q = torch.tensor(p, dtype=torch.float64)
    psi = ipo.WORTH[name]
    assert argmin(name, p) == pytest.approx(link, abs=2e-3)
    assert ((psi(q) - psi(1 - q)) / 2).item() == pytest.approx(link, abs=1e-9)


def test_links_of_the_others(monkeypatch):
    """Robust: logit of the clean probability if labels flip as it assumes, more if they do not. DiscoPOP: two
    wells at p = 1/2, log of the golden ratio from 0: no link. SimPO: a root, logit p only at gamma = 0."""
    monkeypatch.setitem(ipo.LOSSES, "robust", losses.robust)
    monkeypatch.setitem(ipo.LOSSES, "simpo", losses.simpo)
    clean, e = 0.75, 0.1
    assert argmin("robust", clean * (1 - e) + (1 - clean) * e) == pytest.approx(math.log(3), abs=2e-3)
    assert argmin("robust", clean) == pytest.approx(math.log(0.65 / 0.15), abs=2e-3)
    assert abs(argmin("discopop", 0.5)) == pytest.approx(math.log((1 + 5**0.5) / 2), abs=2e-3)
    k = math.exp(0.1)
    root = (k * 0.5 + (k**2 / 4 + 4 * 0.75 * 0.25) ** 0.5) / (2 * 0.25)
    assert argmin("simpo", 0.75) == pytest.approx(math.log(root), abs=2e-3)
    assert abs(math.log(root) - math.log(3)) > 0.04


@pytest.mark.parametrize("name", NUMPY)
def test_large_margins_are_finite_where_exact_values_are(name):
    """float32 against float64, value and slope: 0 exp(89) is 0 and not 0 * inf. What float32 cannot hold is
    infinite (or near its largest number), never NaN."""
    z = [sign * size for size in (0, 0.5, 5, 30, 80, 88, 89, 95, 104, 300, 2000) for sign in (1, -1)]
    h, p = map(list, zip(*itertools.product(map(float, z), (0.0, 1e-4, 0.25, 0.5, 0.999, 1.0))))
    p = torch.tensor(p, dtype=torch.float32).double().tolist()
    ours, exact = value_and_slope(name, h, p, dtype=torch.float32), value_and_slope(name, h, p)
    for single, double in zip(ours, exact):
        holds = double.abs() < 3e38
        assert holds.float().mean() > 0.6 and not single.isnan().any()
        assert (single[~holds].abs() > 2.9e38).all()
        assert torch.allclose(single[holds].double(), double[holds], rtol=1e-4, atol=1e-6)


def test_every_loss_changes_the_weights_differently(tmp_path):
    """Three steps from the same start on the same soft pairs: no name is another's alias, own flags count."""
    weights = []
    runs = [[name] for name in FUNCTIONS] + [["dpo"], ["ipo"]]
    runs += [["robust", "--label_noise", "0.3"], ["simpo", "--gamma", "1"]]
    for number, (name, *own) in enumerate(runs):
        out = str(tmp_path / str(number))
        argv = ["--loss", name, *own, "--labels", "soft", *FAST, "--lr", "1e-2", "--out", out]
        assert losses.main(argv) == 0
        policy, _ = ipo.model.load(f"{out}/ckpt.pt")
        weights.append(torch.cat([w.detach().flatten() for w in policy.parameters()]))
    for a, b in itertools.combinations(weights, 2):
        assert (a - b).abs().max() > 1e-5


def test_simpo_reads_no_reference(tmp_path, capsys, monkeypatch):
    """Its loss at step 1 and its margins are those of mean log-probs alone; KL and win are still measured."""
    seen = []
    offline = losses.core_offline

    def watched(source, ref_logp, args, generator):
        seen.append((source, ref_logp))
        return offline(source, ref_logp, args, generator)

    monkeypatch.setattr(losses, "core_offline", watched)
    out = str(tmp_path / "run")
    assert losses.main(["--loss", "simpo", "--tau", "2", "--gamma", "0.7", *FAST, "--out", out]) == 0
    (source, ref_logp), = seen
    assert not ref_logp.any() and "theory does not know" in capsys.readouterr().out
    report = json.loads((tmp_path / "run/report.json").read_text())
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["logp"] == "mean" and config["gamma"] == 0.7
    policy, _ = ipo.model.load(f"{out}/ckpt.pt")
    tokens, mask = source.pairs.padded(torch.arange(1600))
    with torch.no_grad():
        means = ipo.sequence_logp(policy, tokens, mask, mean=True)
    z = 2 * (means[source.pairs.chosen] - means[source.pairs.rejected])
    due = np.log1p(np.exp(0.7 - z.double().numpy())).mean()
    assert report["after"]["loss"] == pytest.approx(due, rel=1e-4)
    assert report["after"]["h"] == pytest.approx(z.mean().item() / 2, abs=1e-5)
    assert report["after"]["kl_ref"] > 0 and report["before"]["kl_ref"] == pytest.approx(0, abs=1e-6)
    assert ipo.offline is offline and ipo.run is losses.core_run  # the core is itself again


def test_simpo_on_a_file(tmp_path):
    """The held-out pairs' margins are mean log-probs as well: `chosen` is negative before any training."""
    lines = [{"prompt": f"{i}:", "chosen": " yes" * (i % 3 + 1), "rejected": " no"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--loss", "simpo", "--tokenizer", "bytes", "--steps", "2", "--sft_steps", "2", "--n_layer", "1"]
    argv += ["--n_embd", "16", "--block_size", "32", "--data", str(tmp_path / "pairs.jsonl")]
    assert losses.main([*argv, "--out", str(tmp_path / "run")]) == 0
    before = json.loads((tmp_path / "run/report.json").read_text())["before"]
    assert before["chosen"] == pytest.approx(-5, abs=1) and before["rejected"] == pytest.approx(-5, abs=1)


def test_own_flags_are_resumed_and_checked(tmp_path, capsys):
    """config.json has them, so a resumed run is the same run, a contradiction is refused; so is half."""
    argv = ["--loss", "robust", "--label_noise", "0.2", *FAST, "--out", str(tmp_path / "run")]
    assert losses.main(argv) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["label_noise"] == 0.2
    assert losses.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert losses.main(["--resume", "--label_noise", "0.3", "--out", str(tmp_path / "run")]) == 2
    assert "contradicts" in capsys.readouterr().err
    assert losses.main(["--loss", "robust", "--label_noise", "0.5", "--out", str(tmp_path / "other")]) == 2
    assert "below 0.5" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_rebel_needs_uncertain_labels(tmp_path, capsys):
    """Its target at p = 1 is infinite: one line, status 2."""
    assert losses.main(["--loss", "rebel", *FAST, "--out", str(tmp_path / "run")]) == 2
    assert "infinite margin" in capsys.readouterr().err


def test_the_table_is_made_of_runs(tmp_path, capsys):
    """Every loss with hard and soft labels; each cell is its run's, measured against its own link's pi*.
    What an interrupted table left is made again."""
    (tmp_path / "t/ipo-hard").mkdir(parents=True)
    (tmp_path / "t/ipo-hard/ref.pt").touch()
    assert losses.main(["--table", "--out", str(tmp_path / "t"), *FAST]) == 0
    report = json.loads((tmp_path / "t/report.json").read_text())
    assert report.keys() == {"ipo", "dpo", *FUNCTIONS, "savage-slow", "robust-noise", "dpo-noise"}
    assert report["rebel"]["hard"] is None and report["rebel"]["soft"] > 0 and report["ipo"]["hard"] > 0
    for name, row in report.items():
        run = json.loads((tmp_path / f"t/{name}-soft/report.json").read_text())
        assert row["soft"] == run["after"]["kl_opt"] and row["pi* to ref"] == run["opt"]["kl_ref"]
    assert json.loads((tmp_path / "t/dpo-noise-hard/config.json").read_text())["noise"] == 0.1
    config = json.loads((tmp_path / "t/savage-slow-hard/config.json").read_text())
    assert config["tau"] == 1 and config["labels"] == "hard" and config["lr"] == pytest.approx(3e-4)
    # logit's pi* is dpo's; the exponential's is that of half of logit, less far from ref
    far = {name: row["pi* to ref"] for name, row in report.items()}
    assert far["discopop"] == far["simpo"] == far["dpo"] > 2 * far["exponential"]
    assert "discopop" not in ipo.WORTH
    assert losses.main(["--table", "--data", "nofile.jsonl", "--out", str(tmp_path / "t2")]) == 2
    assert "world" in capsys.readouterr().err


def test_the_core_refuses_to_go_on_with_a_loss_that_it_lacks(tmp_path, capsys, monkeypatch):
    """`python ipo.py --resume` knows ipo and dpo alone: one line, status 2, and the run can go on here."""
    flags = [*FAST, "--loss", "savage", "--out", str(tmp_path)]
    assert losses.main(flags) == 0
    kept = (tmp_path / "config.json").read_text()
    monkeypatch.delitem(ipo.LOSSES, "savage")
    capsys.readouterr()
    assert ipo.main(["--resume", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ipo.py: argument --loss: invalid choice: 'savage'") and error.count("\n") == 1
    assert (tmp_path / "config.json").read_text() == kept
    monkeypatch.undo()
    assert losses.main(["--resume", "--out", str(tmp_path)]) == 0
