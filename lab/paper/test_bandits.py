"""Claims of lab/paper/bandits.py, each with its oracle."""
import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import ipo
from lab.common import pictures, start
from lab.paper import bandits

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
LIMITS = {
    "bandit2": (1, 0),
    "d1": (1, 0, 0),
    "d2": THIRDS,
    "d3": THIRDS,
    "d3prime": (0.5, 0.5, 0),
}


def run(out, *flags):
    """The numbers of each policy, from report.json."""
    bandits.run([*map(str, flags), "--out", str(out)])
    report = json.loads((out / "report.json").read_text())
    runs = report["runs"]
    for numbers in runs.values():
        numbers["after"] = numbers["log"][-1]
    return runs


@pytest.mark.parametrize("name, tau", PAPER)
def test_the_optimum_is_the_paper_s(name, tau):
    posed = bandits.pose("ipo", tau, *bandits.bandit(name))
    assert posed.opt["pi"] == pytest.approx(PAPER[name, tau], abs=1e-6)


@pytest.mark.parametrize("name, tau", PAPER)
def test_the_optimum_fits_the_pairs(name, tau):
    """Least squares on the pairs alone, without p* or mu: each asks for 1/(2 tau)."""
    winner, loser, pstar = bandits.bandit(name)
    actions = np.eye(pstar.shape[1])
    signs = actions[winner.tolist()] - actions[loser.tolist()]
    asked = np.full(len(winner), 1 / (2 * tau))
    logits = np.linalg.lstsq(signs, asked, rcond=None)[0]  # the shortest solution: d3's c stays at 0
    odds = np.exp(logits)
    assert odds / odds.sum() == pytest.approx(PAPER[name, tau], abs=1e-6)


@pytest.mark.parametrize("name", LIMITS)
def test_dpo_s_optimum_is_a_limit(name):
    """pi* of logit at p* clipped to [e, 1 - e], for e = 1e-30."""
    winner, loser, pstar = bandits.bandit(name)
    Y = pstar.shape[1]
    uniform = torch.full((1, Y), 1 / Y, dtype=torch.float64)
    clipped = data.optimum(uniform.log(), torch.logit(pstar, eps=1e-30), uniform, 0.5)
    assert clipped.exp()[0].tolist() == pytest.approx(LIMITS[name], abs=1e-9)
    posed = bandits.pose("dpo", 0.5, winner, loser, pstar)
    assert posed.opt["pi"] == pytest.approx(LIMITS[name])


def adam(pairs, slope, draws, lr=0.01):
    """One policy by hand: numpy, Adam as published, the mean gradient over the pairs of each step."""
    theta, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for t, drawn in enumerate(draws, 1):
        gradient = np.zeros(3)
        for winner, loser in pairs[drawn]:
            push = slope(theta[winner] - theta[loser]) / len(drawn)
            gradient[winner] += push
            gradient[loser] -= push
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient ** 2
        theta -= lr * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
    return np.exp(theta) / np.exp(theta).sum()


SLOPES = {
    "ipo": lambda h, tau: 2 * (h - 1 / (2 * tau)),
    "dpo": lambda h, tau: -tau / (1 + math.exp(tau * h)),
}
TAUS = (0.1, 1.0)
ALL = [(loss, k) for loss in SLOPES for k in (0, 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """60 steps at two taus, 3 seeds, and the pairs that each step drew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "psi", lambda q: q)
        patch.setattr(bandits, "SEEDS", 3)
        flags = "--steps", 60, "--tau", *TAUS, "--seed", 7
        report = run(tmp_path_factory.mktemp("bandits"), *flags)
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randint(3, (2, 3, 9), generator=generator) for _ in range(60)]
    return report, torch.stack(draws).numpy()


@pytest.mark.parametrize("loss, k", ALL)
def test_every_policy_is_the_one_that_is_trained_alone(trained, loss, k):
    """Means over seeds, of policies trained one by one in numpy."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    report, draws = trained
    tau = TAUS[k]
    pairs = np.array([(0, 1), (1, 2), (0, 2)])
    alone = []
    for seed in range(3):
        alone.append(adam(pairs, lambda h: SLOPES[loss](h, tau), draws[:, k, seed]))
    after = report[f"{loss}, tau {tau:g}"]["after"]
    assert after["pi"] == pytest.approx(np.mean(alone, 0), abs=1e-9)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """flags -> (what `run` gives, what it printed, its figures by name), of one run for equal flags."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    known = {}

    def once(*flags):
        if flags not in known:
            drawn, said, folder = {}, io.StringIO(), tmp_path_factory.mktemp("pictured")
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
                patch.setattr(ipo, "psi", lambda q: q)
                patch.setattr(pictures, "save", lambda figure, path: drawn.update({path: figure}))
                report = run(folder, *flags)
            named = {Path(path).name: figure for path, figure in drawn.items()}
            known[flags] = report, said.getvalue(), named
        return known[flags]

    return once


FIGURE_1 = "--tau", 0.1, 0.5, "--steps", 2200
ONE_PAIR = "--data", "bandit2", "--tau", 0.1, "--steps", 1100


def test_ipo_arrives_at_its_optimum_in_figure_1(pictured):
    report, _, _ = pictured(*FIGURE_1)
    for tau in (0.1, 0.5):
        pi = report[f"ipo, tau {tau:g}"]["after"]["pi"]
        assert pi == pytest.approx(PAPER["d1", tau], abs=0.01)


def test_dpo_is_greedy_in_figure_1(pictured):
    report, _, _ = pictured(*FIGURE_1)
    assert report["dpo, tau 0.1"]["after"]["pi"][0] > 0.999
    assert report["dpo, tau 0.5"]["after"]["pi"][0] > 0.999


def test_the_picture_shows_the_numbers(tmp_path, figures):
    """Of each action a curve, which ends at the mean, then its dashed optimum."""
    report = run(tmp_path, "--steps", 200)
    axes = figures[f"{tmp_path}/actions.png"].axes
    assert [axis.get_title()[:3] for axis in axes] == 3 * ["ipo", "dpo"]
    for axis in axes:
        numbers = report[axis.get_title()]
        ends = [line.get_ydata()[-1] for line in axis.lines]
        assert ends[::2] == pytest.approx(numbers["after"]["pi"])
        assert ends[1::2] == pytest.approx(numbers["opt"]["pi"])


def test_ipo_s_margin_stops(pictured):
    """One certain pair, tau .1: 5 nats, and never much more."""
    report, _, figures = pictured(*ONE_PAIR)
    assert report["ipo, tau 0.1"]["after"]["h"] == pytest.approx(5, abs=1e-4)
    curve = figures["margins.png"].axes[0].lines[0].get_ydata()
    assert max(curve) < 5.05


def test_dpo_s_margin_grows_at_every_look(pictured):
    report, _, figures = pictured(*ONE_PAIR)
    lines = figures["margins.png"].axes[0].lines
    curves = [line.get_ydata() for line in lines if len(line.get_ydata()) == 12]
    assert all(np.diff(curves[1]) > 0)
    assert curves[1][-1] == report["dpo, tau 0.1"]["after"]["h"] > 15


def test_the_printed_d3_leaves_all_at_a_third(tmp_path, figures):
    """a and b balance, c is in no pair: what moves is the noise of mini-batches."""
    for numbers in run(tmp_path, "--data", "d3", "--steps", 300).values():
        assert numbers["after"]["pi"] == pytest.approx(THIRDS, abs=0.02)


@pytest.mark.parametrize("flags, begins", [
    (FIGURE_1, "Yes: on d1"),
    (("--tau", 0.1, 0.5, "--steps", 100), "Not yet, raise --steps: on d1")])
def test_the_answer_stands_before_the_figures(pictured, flags, begins):
    _, said, _ = pictured(*flags)
    answer, _, _, *rows = said.splitlines()[-7:]
    assert answer.startswith(begins)
    names = [row[4:16] for row in rows]
    assert names == ["ipo, tau 0.1", "ipo, tau 0.5", "dpo, tau 0.1", "dpo, tau 0.5"]


@pytest.mark.parametrize("name", ["d1", "d3prime"])
def test_the_readme_quotes_the_optima(tmp_path, figures, capsys, quoted, cells, name):
    """The table that the page has for these pairs, but for where training ends."""
    run(tmp_path, "--data", name, "--steps", 1)
    printed = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  |")]
    page = [cells(line) for line in quoted[f"python -m lab.paper.bandits --data {name}"]]
    assert page[0] == printed[0]
    for row, due in zip(page, printed, strict=True):
        assert row[::2] == due[::2]


BAD = [
    (["--data", "d9"], "invalid choice"),
    (["--tau", "0"], "must be above 0"),
    (["--tau", "0.1", ".1"], "0.1 is given twice"),
]


@pytest.mark.parametrize("flags, why", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, flags, why):
    assert start.main("bandits", bandits.run, [*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bandits: ") and error.count("\n") == 1
    assert why in error


def test_a_psi_without_a_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ipo, "psi", torch.logit)
    with pytest.raises(data.Refused, match="infinite margin"):
        run(tmp_path)
