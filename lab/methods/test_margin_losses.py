"""The claims of margin_losses: values, slopes, links, large margins, exact minimisers, runs."""
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import ipo
from lab.common import exact, start
from lab.methods import margin_losses

pytestmark = pytest.mark.usefixtures("bt3")
SMALL = ["--data", "bt3", "--steps", "3", "--sft_steps", "3", "--pairs", "300", "--log_every", "3",
         "--batch_size", "32"]
SLOPES = {  # at h = 0, p = 1, in units of tau, worked out by hand
    "slic": -1,
    "squared_hinge": -2,
    "exponential": -1,
    "savage": -1 / 4,
    "cdpo": -0.4,
    "robust": -1 / 2 / 0.8,
    "discopop": 5 * (1 - math.log(2)) - 3 / 4,
    "exo": math.log(0.001 / 0.999) / 4,
}
START = {  # the value there
    "slic": 1,
    "squared_hinge": 1,
    "exponential": 1,
    "savage": 1 / 4,
    "cdpo": math.log(2),
    "robust": math.log(2),
    "discopop": (1 + math.log(2)) / 2,
    "exo": -math.log(2) - math.log(0.001 * 0.999) / 2,
}


def f_exo(z):
    won = 1 / (1 + np.exp(-z))
    return won * np.log(won / 0.999) + (1 - won) * np.log((1 - won) / 0.001)


def f_discopop(z):
    m = 1 / (1 + np.exp(-z / 0.05))
    return (1 - m) * np.log1p(np.exp(-z)) + m * np.exp(-z)


def f_dpo(z):
    return np.log1p(np.exp(-z))


NUMPY = {  # f(z) of a certain pair, written anew
    "slic": lambda z: np.maximum(0, 1 - z),
    "squared_hinge": lambda z: np.maximum(0, 1 - z) ** 2,
    "exponential": lambda z: np.exp(-z),
    "savage": lambda z: (1 + np.exp(z)) ** -2.0,
    "cdpo": lambda z: 0.9 * f_dpo(z) + 0.1 * f_dpo(-z),
    "robust": lambda z: (0.9 * f_dpo(z) - 0.1 * f_dpo(-z)) / 0.8,
    "discopop": f_discopop,
    "exo": f_exo,
}
NEW = margin_losses.NEW
LINKED = ["ipo", "dpo", "rebel", "savage", "exponential", "squared_hinge", "slic", "exo"]


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    """What run() adds to the core's tables goes with the test."""
    monkeypatch.setattr(ipo, "LOSSES", dict(ipo.LOSSES))
    monkeypatch.setattr(ipo, "PSI_OF", dict(ipo.PSI_OF))


def value_and_slope(name, h, p, tau=1.0, dtype=torch.float64):
    h = torch.tensor(h, dtype=dtype, requires_grad=True)
    loss = NEW[name](h, torch.tensor(p, dtype=dtype), tau)
    loss.sum().backward()
    return loss.detach(), h.grad


def test_importing_changes_nothing_in_the_core():
    assert set(ipo.LOSSES) == {"ipo", "dpo"}
    assert set(ipo.PSI_OF) == {"ipo", "dpo"}


@pytest.mark.parametrize("name", NUMPY)
def test_a_loss_is_its_papers_formula(name):
    rng = np.random.default_rng(0)
    h, p = rng.normal(0, 3, 50), rng.random(50)
    ours = NEW[name](torch.tensor(h), torch.tensor(p), 0.7)
    won, lost = NUMPY[name](0.7 * h), NUMPY[name](-0.7 * h)
    due = p * won + (1 - p) * lost
    assert np.allclose(ours.numpy(), due)


def formulas():
    """(loss, f(z)) of the README's table, as Python: powers, and the products that it writes as spaces."""
    page = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| `--loss` \| f\(z\) \|\n\|---\|---\|\n(.*?)\n\n", page, re.M | re.S)[1]
    for line in table.splitlines():
        name, formula = [cell.strip() for cell in line.strip("|").split("|")]
        formula = formula.replace("^", "**")
        yield name, re.sub(r"(?<=[\d)]) (?=[a-z(])", "*", formula)


WORDS = {
    "exp": np.exp,
    "log": np.log,
    "max": np.maximum,
    "dpo": f_dpo,
    "s": lambda x: 1 / (1 + np.exp(-x)),
    "logit": lambda p: np.log(p / (1 - p)),
    "tau": 0.5,
    "z": np.linspace(-3, 3, 13),
}


@pytest.mark.parametrize("name, formula", [*formulas()])
def test_the_readme_s_formula_is_the_loss(name, formula):
    """For a first response that surely won; rebel's takes p."""
    loss = (ipo.LOSSES | NEW)[name]
    p = 0.8 if name == "rebel" else 1.0
    h = torch.tensor(WORDS["z"] / WORDS["tau"])
    ours = loss(h, torch.full_like(h, p), WORDS["tau"])
    assert np.allclose(ours.numpy(), eval(formula, WORDS | {"p": p}))


def test_the_readme_has_every_formula():
    assert {name for name, _ in formulas()} == ipo.LOSSES.keys() | NEW.keys()


@pytest.mark.parametrize("name", NEW)
def test_swapping_responses_and_probability_changes_nothing(name):
    h = torch.tensor([0.3, -2.0, 1.0])
    p = torch.tensor([0.2, 0.5, 0.9])
    swapped = NEW[name](-h, 1 - p, 0.7)
    assert torch.allclose(NEW[name](h, p, 0.7), swapped)


def test_rebel_is_ipo_with_psi_logit(monkeypatch):
    monkeypatch.setattr(ipo, "psi", torch.logit)
    h = torch.tensor([1.0, 0.5, -3.0])
    p = torch.tensor([0.6, 0.1, 0.9])
    due = ipo.ipo_loss(h, p, 0.5)
    assert torch.allclose(margin_losses.rebel(h, p, 0.5), due)


@pytest.mark.parametrize("name", SLOPES)
def test_value_and_slope_at_the_start(name):
    value, slope = value_and_slope(name, [0.0], [1.0], tau=0.3)
    assert value.item() == pytest.approx(START[name], rel=1e-9)
    assert slope.item() == pytest.approx(0.3 * SLOPES[name], rel=1e-9)


def test_discopop_first_leads_away_from_the_chosen_response():
    _, slope = value_and_slope("discopop", [0.0], [1.0])
    assert slope.item() == pytest.approx(0.784, abs=5e-4)


def argmin(name, p):
    """The z of least loss for a pair preferred with probability p, on a grid of 1/1000."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    loss = ipo.LOSSES[name](z, torch.tensor(p, dtype=torch.float64), 1.0)
    return z[loss.argmin()].item()


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", LINKED)
def test_psi_is_the_link_of_the_loss(name, p):
    margin_losses.add_losses(0.1)
    psi, q = ipo.PSI_OF[name], torch.tensor(p, dtype=torch.float64)
    link = (psi(q) - psi(1 - q)).item() / 2
    assert argmin(name, p) == pytest.approx(link, abs=2e-3)


def test_robust_finds_the_true_probability_behind_flips_and_cdpo_does_not():
    margin_losses.add_losses(0.1)
    flipped = exact.noisy(0.75, 0.1)
    assert argmin("robust", flipped) == pytest.approx(math.log(3), abs=2e-3)
    assert argmin("cdpo", flipped) < argmin("dpo", flipped) < math.log(3) - 0.2


@pytest.mark.parametrize("name", NUMPY)
def test_large_margins_are_finite_where_exact_values_are(name):
    """float32 against float64, value and slope: 0 exp(89) is 0 and not 0 * inf, and nothing is NaN."""
    sizes = torch.tensor([0, 0.5, 5, 30, 80, 88, 89, 95, 104, 300, 2000])
    h = torch.cat([sizes, -sizes]).repeat(4).tolist()
    p = torch.tensor([0, 0.25, 0.5, 1]).repeat_interleave(22).tolist()
    ours = value_and_slope(name, h, p, dtype=torch.float32)
    for single, double in zip(ours, value_and_slope(name, h, p)):
        holds = double.abs() < 3e38
        assert not single.isnan().any()
        assert torch.allclose(single[holds].double(), double[holds], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- exact minimisers

def small(seed=0):
    """A random world of 2 prompts x 4 responses, Bradley-Terry's."""
    random = torch.Generator().manual_seed(seed)
    r = 2 * torch.randn(2, 4, dtype=torch.float64, generator=random)
    ref, mu = torch.randn(2, 2, 4, dtype=torch.float64, generator=random).log_softmax(-1)
    pstar = (r[:, :, None] - r[:, None, :]).sigmoid()
    return SimpleNamespace(pstar=pstar, exact={"ref": ref}, mu=mu.exp())


def minimiser(loss, labels, noise=0.0):
    margin_losses.add_losses(0.1)
    world, args = small(), SimpleNamespace(loss=loss, tau=0.5, labels=labels)
    world.pstar = exact.noisy(world.pstar, noise)
    return exact.minimise(margin_losses.expectation(world, args), world.exact["ref"])


def optimum(psi, tau=0.5):
    world = small()
    return data.optimum(world.exact["ref"], psi(world.pstar), world.mu, tau)


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("loss", ["ipo", "dpo", "exponential"])
def test_the_minimiser_is_pi_star_of_the_link(loss, labels):
    _, psi = margin_losses.PSI[loss]
    found = minimiser(loss, labels)
    assert torch.allclose(found, optimum(psi), atol=1e-5)


def test_rebel_with_soft_labels_has_dpos_minimiser():
    found = minimiser("rebel", "soft")
    assert torch.allclose(found, optimum(torch.logit), atol=1e-5)


def test_robust_has_dpos_minimiser_behind_flipped_labels():
    found = minimiser("robust", "hard", noise=0.1)
    assert torch.allclose(found, optimum(torch.logit), atol=1e-4)


def test_flipped_labels_are_a_larger_tau_for_ipo():
    """g shrinks by 1 - 2 noise, so the optimum is that of tau / (1 - 2 noise)."""
    found = minimiser("ipo", "hard", noise=0.1)
    assert torch.allclose(found, optimum(lambda q: q, tau=0.5 / 0.8), atol=1e-5)


def test_cdpo_has_the_minimiser_of_dpo_with_flipped_labels():
    found = minimiser("cdpo", "hard")
    flipped = minimiser("dpo", "hard", noise=0.1)
    assert torch.allclose(found, flipped, atol=1e-5)


def test_the_expectation_is_a_sum_over_pairs_and_outcomes():
    margin_losses.add_losses(0.1)
    world, certain = small(1), torch.ones(())
    logp = torch.randn(2, 4, dtype=torch.float64).log_softmax(-1)
    f, ref, total = ipo.LOSSES["exo"], world.exact["ref"], 0.0
    for x, y, z in itertools.product(range(2), range(4), range(4)):
        h = logp[x, y] - ref[x, y]
        h = h - logp[x, z] + ref[x, z]
        p = world.pstar[x, y, z]
        won, lost = f(h, certain, 0.3), f(-h, certain, 0.3)
        weight = world.mu[x, y] * world.mu[x, z]
        total += weight * (p * won + (1 - p) * lost) / 2
    args = SimpleNamespace(loss="exo", tau=0.3, labels="hard")
    assert torch.allclose(margin_losses.expectation(world, args)(logp), total)


def test_a_policy_at_the_minimiser_has_distance_zero():
    world = small()
    margin_losses.add_losses(0.1)
    mean = margin_losses.expectation(world, SimpleNamespace(loss="ipo", tau=0.5, labels="hard"))
    row, _ = exact.measured(mean, optimum(lambda q: q), world, world.pstar)
    assert row["KL to its minimiser"] == pytest.approx(0, abs=1e-6)
    assert row["loss above it"] == pytest.approx(0, abs=1e-6)


def test_a_loss_that_falls_without_end_has_no_minimiser():
    """Certain preferences and DPO's loss: the margins grow as long as LBFGS goes on."""
    world = small()
    world.pstar = (world.pstar > 0.5).double() + torch.eye(4) / 2
    mean = margin_losses.expectation(world, SimpleNamespace(loss="dpo", tau=0.01, labels="hard"))
    row, _ = exact.measured(mean, world.exact["ref"], world, world.pstar)
    assert row["KL to its minimiser"] is None


# ------------------------------------------------------------------------------------------------------- runs

def status(tmp_path, *argv):
    """The exit status of the program; its files are in tmp_path / "m"."""
    argv = [*argv, "--out", str(tmp_path / "m")]
    return start.main("margin_losses", margin_losses.run, argv)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_row_is_what_the_run_left(tmp_path, capsys):
    assert status(tmp_path, "--loss", "ipo", *SMALL) == 0
    row = report_of(tmp_path / "m")["ipo"]
    run = report_of(tmp_path / "m/ipo")
    assert row["policy to pi*"] == pytest.approx(run["after"]["kl_opt"], abs=1e-9)
    assert row["KL to ref"] == pytest.approx(run["after"]["kl_ref"], abs=1e-9)
    assert "These optimise pi* of their Psi: ipo." in capsys.readouterr().out


def test_without_a_name_all_losses_run_that_can(tmp_path, capsys, quoted, cells):
    """And the README's table has these rows, with these columns and Psis."""
    assert status(tmp_path, *SMALL) == 0
    report = report_of(tmp_path / "m")
    assert report.keys() > margin_losses.PSI.keys() - {"rebel"}
    assert "rebel" not in report
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  |")]
    page = quoted["python -m lab.methods.margin_losses"]
    assert cells(page[0]) == cells(printed[0])
    assert [cells(line)[:2] for line in page] == [cells(line)[:2] for line in printed]


def test_noise_flips_labels_and_pi_star_stays_the_true_one(tmp_path):
    assert status(tmp_path, "--loss", "ipo", *SMALL, "--noise", "0.4") == 0
    flags = ipo.model.read(f"{tmp_path}/m/ipo/ref.pt")["flags"]
    assert flags["noise"] == 0.4
    row = report_of(tmp_path / "m")["ipo"]
    assert 0 < row["minimiser to pi*"] < row["pi* to ref"]


def test_pairs_are_labelled_by_what_is_flipped():
    """A share .1 of sure preferences reversed: that share of pairs has the worse response first."""
    args = ipo.parse(["--data", "deterministic", "--pairs", "20000"])
    args.noise = 0.1
    source = margin_losses.Flipped(args)
    source.set_reference(torch.full((1600,), -math.log(400)))
    pairs, reward = source.pairs, source.reward.flatten()
    gap = reward[pairs.chosen] - reward[pairs.rejected]
    worse = (gap < -1e-6).float().sum() / (gap.abs() > 1e-6).float().sum()
    assert worse.item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("argv, why", [
    (["--loss", "rebel"], "infinite margin"),
    (["--loss", "simpo"], "--loss"),
    (["--noise", "0.6"], "--noise"),
    (["--data", "nosuch.jsonl"], "invalid choice: 'nosuch.jsonl'"),
    (["--loss", "ipo", "ipo"], "twice")])
def test_bad_input_is_one_line(argv, why, tmp_path, capsys):
    assert status(tmp_path, *argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("margin_losses: ")
    assert why in said
    assert said.count("\n") == 1
