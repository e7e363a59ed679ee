"""Claims of lab/paper/paper.py, each with its oracle."""
import json
import math

import numpy as np
import pytest
import torch

import data
import ipo
from lab.common import pictures
from lab.paper import paper

PAPER = {  # section 5's exact IPO probabilities, computed by hand from eq. 7
    ("bandit2", 0.1): (0.993307, 0.006693),
    ("bandit2", 0.5): (0.731059, 0.268941),
    ("bandit2", 1.0): (0.622459, 0.377541),
    ("d1", 0.1): (0.964370, 0.034403, 0.001227),
    ("d1", 0.5): (0.562742, 0.288921, 0.148337),
    ("d1", 1.0): (0.448441, 0.321322, 0.230237),
    ("d2", 0.5): (1 / 3, 1 / 3, 1 / 3),
    ("d3", 0.1): (1 / 3, 1 / 3, 1 / 3),
    ("d3prime", 0.1): (0.498321, 0.498321, 0.003358),
    ("d3prime", 0.5): (0.422319, 0.422319, 0.155362),
    ("d3prime", 1.0): (0.383652, 0.383652, 0.232697),
}
THIRDS = (1 / 3, 1 / 3, 1 / 3)
LIMITS = {"bandit2": (1, 0), "d1": (1, 0, 0), "d2": THIRDS, "d3": THIRDS, "d3prime": (0.5, 0.5, 0)}


def run(out, *flags):
    """The exit status of lab.paper.paper, and its report.json."""
    status = paper.main([*map(str, flags), "--out", str(out)])
    return status, json.loads((out / "report.json").read_text()) if status == 0 else {}


@pytest.mark.parametrize("name, tau", PAPER)
def test_the_optimum_is_the_papers_and_that_of_the_pairs(name, tau):
    """Eq. 7 with p* gives the table; so does least squares on the pairs alone, without p* or mu."""
    winner, loser, pstar = paper.bandit(name)
    best = paper.pose("ipo", tau, winner, loser, pstar).report["opt"]["pi"]
    assert best == pytest.approx(PAPER[name, tau], abs=1e-6)
    signs = np.eye(len(best))[winner.tolist()] - np.eye(len(best))[loser.tolist()]
    asked = np.full(len(winner), 1 / (2 * tau))
    odds = np.exp(np.linalg.lstsq(signs, asked, rcond=None)[0])  # the shortest solution: d3's c stays at 0
    assert odds / odds.sum() == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("name", LIMITS)
def test_dpos_optimum_is_a_limit(name):
    """pi* of logit at p* clipped to [e, 1 - e], for e = 1e-30, is what is called the limit."""
    winner, loser, pstar = paper.bandit(name)
    report = paper.pose("dpo", 0.5, winner, loser, pstar).report
    uniform = torch.full_like(pstar[0, :1], 1 / pstar.shape[1])
    clipped = data.optimum(uniform.log(), torch.logit(pstar, eps=1e-30), uniform, 0.5).exp()[0]
    assert report["opt"]["pi"] == pytest.approx(LIMITS[name])
    assert clipped.tolist() == pytest.approx(LIMITS[name], abs=1e-9)
    assert report["before"]["target"] is None


def adam(pairs, actions, slope, draws, lr=0.01):
    """One policy by hand: numpy, Adam as published, the mean gradient over the pairs of each step."""
    theta, m, v = np.zeros(actions), np.zeros(actions), np.zeros(actions)
    for t, drawn in enumerate(draws, 1):
        gradient = np.zeros(actions)
        for w, l in pairs[drawn]:
            gradient[[w, l]] += np.array([1, -1]) * slope(theta[w] - theta[l]) / len(drawn)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient ** 2
        theta -= lr * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
    return np.exp(theta) / np.exp(theta).sum()


def test_every_policy_is_the_one_that_is_trained_alone(tmp_path, figures):
    """Means and 1.96 standard errors over seeds, of policies trained one by one in numpy with these draws."""
    steps, taus, seeds = 60, (0.1, 1.0), 3
    status, report = run(tmp_path, "--steps", steps, "--tau", *taus, "--seeds", seeds, "--seed", 7)
    generator, pairs = torch.Generator().manual_seed(7), np.array([(0, 1), (1, 2), (0, 2)])
    draws = torch.stack([torch.randint(3, (2, seeds, 9), generator=generator) for _ in range(steps)]).numpy()
    for k, tau in enumerate(taus):
        slopes = {"ipo": lambda h: 2 * (h - 1 / (2 * tau)), "dpo": lambda h: -tau / (1 + math.exp(tau * h))}
        for loss, slope in slopes.items():
            pi = np.array([adam(pairs, 3, slope, draws[:, k, seed]) for seed in range(seeds)])
            after = report[f"{loss}, tau {tau:g}"]["after"]
            assert after["pi"] == pytest.approx(pi.mean(0), abs=1e-9)
            assert after["interval"] == pytest.approx(1.96 * pi.std(0, ddof=1) / 3 ** 0.5, abs=1e-9)
            margins = [np.log(pi[:, w] / pi[:, l]) for w, l in pairs]
            assert after["h"] == pytest.approx(np.mean(margins), abs=1e-9)
    assert status == 0 and sorted(figures) == [f"{tmp_path}/actions.png", f"{tmp_path}/margins.png"]


@pytest.mark.parametrize("name", ["d1", "d3prime"])
def test_all_pairs_in_every_step_reach_the_optimum(tmp_path, figures, name):
    """Within 1e-8, as the rate falls to 0; at a constant rate Adam would circle."""
    flags = "--data", name, "--loss", "ipo", "--batch_size", 0, "--steps", 1500, "--tau", 0.5, 1, "--seeds", 2
    _, report = run(tmp_path, *flags)
    for tau in ("0.5", "1"):
        numbers = report[f"ipo, tau {tau}"]
        assert numbers["after"]["pi"] == pytest.approx(numbers["opt"]["pi"], abs=1e-8)
        assert numbers["after"]["pi"] == pytest.approx(PAPER[name, float(tau)], abs=1e-6)


def test_figure_1_in_small(tmp_path, figures, capsys):
    """IPO stops at its optimum at either tau, DPO is greedy; the picture shows these numbers."""
    status, report = run(tmp_path, "--tau", 0.1, 0.5, "--steps", 3000, "--log_every", 1500)
    for tau in (0.1, 0.5):
        after = report[f"ipo, tau {tau:g}"]["after"]
        assert after["pi"] == pytest.approx(PAPER["d1", tau], abs=0.01)
        assert 1e-4 < max(after["interval"]) < 8e-3  # seeds differ, and their mean is that sure
        assert report[f"dpo, tau {tau:g}"]["after"]["pi"][0] > 0.999
    assert "ipo, tau 0.1: loss 25 at" in (out := capsys.readouterr().out) and "ipo, tau 0.1: a  " in out
    axes = figures[f"{tmp_path}/actions.png"].axes
    assert [axis.get_title()[:3] for axis in axes] == ["ipo", "dpo", "ipo", "dpo"]
    for axis in axes:  # of each action a curve, then its dashed optimum
        numbers = report[axis.get_title()]
        assert [line.get_ydata()[-1] for line in axis.lines[::2]] == pytest.approx(numbers["after"]["pi"])
        assert [line.get_ydata()[0] for line in axis.lines[1::2]] == pytest.approx(numbers["opt"]["pi"])
        assert list(axis.lines[0].get_xdata()) == [0, 1500, 3000] and axis.lines[0].get_ydata()[0] == 1 / 3
        for action, band in enumerate(axis.collections):  # shaded: 1.96 standard errors to either side
            edge = band.get_paths()[0].vertices
            at_end = edge[edge[:, 0] == 3000, 1]
            middle, error = numbers["after"]["pi"][action], numbers["after"]["interval"][action]
            assert (at_end.min(), at_end.max()) == pytest.approx((middle - error, middle + error))
    margin, = figures[f"{tmp_path}/margins.png"].axes
    assert margin.lines[0].get_ydata()[-1] == pytest.approx(report["ipo, tau 0.1"]["after"]["h"])


def test_ipos_margin_stops_and_dpos_does_not(tmp_path, figures):
    """One certain pair, tau .1: 5 nats, and more at every look."""
    _, report = run(tmp_path, "--data", "bandit2", "--tau", 0.1, "--steps", 1500, "--seeds", 2)
    lines = figures[f"{tmp_path}/margins.png"].axes[0].lines
    drawn = {line.get_label(): line for line in lines}
    assert report["ipo, tau 0.1"]["after"]["h"] == pytest.approx(5, abs=1e-4)
    assert {"ipo, tau 0.1", "dpo, tau 0.1", "mean target", "exact pi*"} <= drawn.keys()
    assert report["dpo, tau 0.1"]["after"]["h"] > 15 and report["dpo, tau 0.1"]["opt"]["h"] is None
    ipo_curve, dpo_curve = (line.get_ydata() for line in lines if len(line.get_ydata()) == 16)
    assert max(ipo_curve) < 5.05 and all(np.diff(dpo_curve) > 0)
    assert [5, 5] in [list(line.get_ydata()) for line in lines]  # dashed: what the pair asks for


def test_only_mini_batches_move_d3(tmp_path, figures):
    """The printed D3: a and b balance, c is in no pair, so with all pairs none of the three ever moves."""
    _, report = run(tmp_path, "--data", "d3", "--batch_size", 0, "--steps", 30, "--seeds", 2)
    for numbers in report.values():
        assert numbers["after"]["pi"] == pytest.approx([1 / 3] * 3, abs=1e-12) and numbers["after"]["h"] == 0
    _, report = run(tmp_path, "--data", "d3", "--steps", 30, "--seeds", 2)
    assert report["ipo, tau 0.1"]["after"]["pi"][0] != pytest.approx(1 / 3, abs=1e-4)


def test_bad_input_and_divergence_end_in_a_line(tmp_path, monkeypatch, capsys):
    """Exit status 2 and 1, nothing on stderr but the line; another program's files are left alone."""
    for flags in (["--data", "d9"], ["--seeds", 1], ["--tau", 0], ["--batch_size", -1], ["--loss", "simpo"]):
        assert run(tmp_path, *flags)[0] == 2
        assert capsys.readouterr().err.startswith("paper.py: ")
    assert run(tmp_path, "--lr", 1e308, "--steps", 5)[0] == 1
    assert capsys.readouterr().err == "paper.py: step 1: a logit is not finite; lower --lr or raise --tau\n"
    monkeypatch.setattr(ipo, "psi", torch.logit)
    assert run(tmp_path, "--loss", "ipo")[0] == 2 and "infinite margin" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"data": "pairs.jsonl"}')
    (tmp_path / "report.json").write_text("{}")
    assert run(tmp_path, "--loss", "dpo")[0] == 2 and (tmp_path / "report.json").read_text() == "{}"
