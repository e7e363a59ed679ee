"""The claims of beyond_the_margin and on_the_frontier: against sums by hand, and short runs."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.methods import beyond_the_margin, on_the_frontier
from lab.methods.beyond_the_margin import COSTS, Side

pytestmark = pytest.mark.usefixtures("bt3")
SMALL = ["--data", "bt3", "--sft_steps", "20", "--pairs", "40000"]


def flags_of(loss, **own):
    return SimpleNamespace(**{"loss": loss, "lam": 0.7, "tau": 0.5, "delta": 1.0, "gamma": 0.3} | own)


def small(seed):
    """A random world of 2 prompts x 4 responses of 1 to 3 tokens, its preferences intransitive."""
    random = torch.Generator().manual_seed(seed)
    upper = torch.rand(2, 4, 4, dtype=torch.float64, generator=random).triu(1)
    pstar = upper + (1 - upper.mT).tril(-1)
    pstar.diagonal(dim1=1, dim2=2).fill_(0.5)
    ref = torch.randn(2, 4, dtype=torch.float64, generator=random).log_softmax(-1)
    responses = [[1] * (1 + row % 3) for row in range(8)]
    return SimpleNamespace(
        pstar=pstar,
        exact={"ref": ref},
        mu=torch.full((2, 4), 0.25).double(),
        base=torch.tensor([0.0, 0.2, 0.3, 0.5]).double(),
        pairs=data.PairData([[9]] * 8, responses))


def log_s(z):
    return -math.log1p(math.exp(-z))


def odds(m):
    return math.log(math.exp(m) / (1 - math.exp(m)))


def by_hand(loss, w, l, n, m):
    """w, l: log-probs of winner and loser, n, m: their lengths; the reference's log-probs are -1 and -2."""
    if loss == "cpo":
        return -log_s(0.5 * (w - l)) - 0.7 * w
    if loss == "orpo":
        return -w / n - 0.7 * log_s(odds(w / n) - odds(l / m))
    if loss == "slic_hf":
        return max(0.0, 1 - w + l)
    if loss == "simpo":
        return -log_s(0.5 * (w / n - l / m) - 0.3)
    h = (w + 1) - (l + 2)
    return -log_s(0.5 * (h - 0.7 * max(0, -1 - w)))


CASES = [
    (-1.2, -3.4, 2, 3),
    (-4.0, -0.3, 3, 1),
    (-0.5, -2.1, 1, 1),
]


@pytest.mark.parametrize("w, l, n, m", CASES)
@pytest.mark.parametrize("loss", COSTS)
def test_a_cost_is_its_papers_formula(loss, w, l, n, m):
    winner = Side(*torch.tensor([w, -1.0, n]).double())
    loser = Side(*torch.tensor([l, -2.0, m]).double())
    cost = COSTS[loss](winner, loser, flags_of(loss))
    assert cost.item() == pytest.approx(by_hand(loss, w, l, n, m), abs=1e-6)


@pytest.mark.parametrize("loss", COSTS)
def test_the_expectation_is_a_sum_over_pairs_and_outcomes(loss):
    """Equal pairs are drawn, too; for slic_hf the mean over SFT responses is added."""
    world, args, total = small(1), flags_of(loss), 0.0
    logp = torch.randn(2, 4, dtype=torch.float64).log_softmax(-1)
    ref = world.exact["ref"]
    length = torch.tensor([[1, 2, 3, 1], [2, 3, 1, 2]])
    for x, y, z in itertools.product(range(2), range(4), range(4)):
        first = Side(logp[x, y], ref[x, y], length[x, y])
        second = Side(logp[x, z], ref[x, z], length[x, z])
        p = world.pstar[x, y, z]
        cost = beyond_the_margin.both_orders(first, second, p, args)
        total += cost / 16 / 2
    if loss == "slic_hf":
        total -= 0.7 * (world.base * logp).sum() / 2
    found = beyond_the_margin.expectation(world, args)(logp)
    assert found.item() == pytest.approx(total.item(), abs=1e-12)


@pytest.mark.parametrize("loss", ["cpo", "slic_hf", "dpop"])
def test_what_is_convex_has_one_minimum(loss):
    """LBFGS from the reference and from a far policy: the same loss; less well where there are kinks."""
    world = small(2)
    torch.manual_seed(0)
    far = (3 * torch.randn(2, 4, dtype=torch.float64)).log_softmax(-1)
    mean = beyond_the_margin.expectation(world, flags_of(loss))
    row, _ = exact.measured(mean, far, world, world.pstar)
    assert row["two starts apart"] < (1e-6 if loss == "cpo" else 1e-3)


@pytest.fixture
def begun(tmp_path):
    few = ["--device", "cpu", "--pairs", "6", "--labels", "soft", "--steps", "1"]
    args = ipo.parse([*SMALL, *few, "--out", str(tmp_path)])
    args.batch_size = 6
    policy, source = start.start(args)
    with torch.no_grad():
        policy.transformer.wte.weight[0] += 0.1
    return args, policy, source


@pytest.mark.parametrize("loss", sorted(COSTS.keys() - {"slic_hf"}))
def test_a_step_descends_the_mean_of_its_pairs(loss, begun):
    """All six pairs in one batch, with soft labels; lengths are 1 in so small a world."""
    args, policy, source = begun
    vars(args).update(vars(flags_of(loss)))
    logp, total = source.table(policy).flatten(), 0.0
    ref = source.pairs.ref_logp
    for y, z, p in zip(source.pairs.chosen, source.pairs.rejected, source.pairs.p):
        first, second = (Side(logp[i], ref[i], 1) for i in (y, z))
        total += beyond_the_margin.both_orders(first, second, p, args) / 6
    found, = beyond_the_margin.losses(policy, source, args)
    assert found.item() == pytest.approx(total.item(), abs=1e-5)


def test_slic_hf_descends_the_likelihood_of_sft_responses(begun):
    """delta 0 and the pairs' term is a hinge; with lam twice as large the rest is, too."""
    args, policy, source = begun
    values = []
    for lam in (0.0, 1.0, 2.0):
        vars(args).update(vars(flags_of("slic_hf", lam=lam)))
        loss, = beyond_the_margin.losses(policy, source, args)
        values.append(loss.item())
    assert values[2] - values[0] == pytest.approx(2 * (values[1] - values[0]), abs=1e-4)
    assert values[1] - values[0] > 0.1


def status(tmp_path, *argv):
    argv = [*argv, "--out", str(tmp_path / "b")]
    return start.main("beyond_the_margin", beyond_the_margin.run, argv)


def test_training_ends_at_the_minimiser(tmp_path):
    """150 steps in a world of 4 responses."""
    few = ["--steps", "150", "--lr", "5e-3", "--labels", "soft", "--batch_size", "32", "--n_embd", "16"]
    assert status(tmp_path, *SMALL, *few) == 0
    report = json.loads((tmp_path / "b/report.json").read_text())
    for loss in COSTS:
        assert report[loss]["KL to its minimiser"] < 0.005


def test_a_loss_that_falls_without_end_is_named(tmp_path, monkeypatch, capsys):
    """As SimPO's does in the world deterministic. Its row has a dash, and none counts as a distance."""
    ends = {"simpo": None, "cpo": 0.25}
    monkeypatch.setattr(beyond_the_margin, "row",
                        lambda loss, args: start.Row({"KL to its minimiser": ends[loss]}))
    assert status(tmp_path, "--loss", *ends) == 0
    said = capsys.readouterr().out
    assert "at most 0.2500 nats from there. A dash: there is none" in said
    assert any(line.split()[1:4:2] == ["simpo", "-"] for line in said.splitlines() if "simpo" in line)


def test_dpop_with_lam_5_does_not_leave_the_reference():
    """Among coin flips every winner is a loser elsewhere, and to lower it costs five times what it gains."""
    world = small(3)
    mean = beyond_the_margin.expectation(world, flags_of("dpop", lam=5.0))
    _, best = exact.measured(mean, world.exact["ref"], world, world.pstar)
    assert data.kl(best, world.exact["ref"]) < 1e-4


def test_saved_flags_name_the_loss_and_what_it_reads(tmp_path):
    assert status(tmp_path, *SMALL, "--steps", "1", "--loss", "orpo") == 0
    flags = model.read(f"{tmp_path}/b/orpo/ckpt.pt")["flags"]
    assert flags["loss"] == "orpo"
    assert flags["lam"] == 1
    assert flags["tau"] is None


@pytest.mark.parametrize("argv, why", [
    (["--loss", "ppo"], "--loss"),
    (["--tau", "1"], "--tau does nothing"),
    (["--data", "nosuch.jsonl"], "invalid choice: 'nosuch.jsonl'")])
def test_bad_input_is_one_line(argv, why, tmp_path, capsys):
    assert status(tmp_path, *argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("beyond_the_margin: ")
    assert why in said
    assert said.count("\n") == 1


# ------------------------------------------------------------------------------------------ on_the_frontier

@pytest.fixture(scope="module")
def runs(bt3, tmp_path_factory):
    """Finished runs of ipo.py at two seeds, and at one of them one that is hardly trained."""
    tmp_path = tmp_path_factory.mktemp("runs")
    few = ["--data", "bt3", "--sft_steps", "5", "--pairs", "1000", "--tau", "0.5", "--lr", "1e-2"]
    plan = {
        "0/end": ["--steps", "40"],
        "0/begin": ["--steps", "1"],
        "1/end": ["--steps", "1", "--seed", "1"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "psi", lambda q: q)
        for name, own in plan.items():
            assert ipo.main([*few, *own, "--out", f"{tmp_path}/all/{name}"]) == 0
    return tmp_path


def picture(runs):
    """report.json of on_the_frontier."""
    argv = [f"{runs}/all", "--out", f"{runs}/picture"]
    assert start.main("on_the_frontier", on_the_frontier.run, argv) == 0
    return json.loads((runs / "picture/report.json").read_text())


def test_runs_lie_on_the_frontier_or_below(runs, figures):
    methods = picture(runs)["methods"]
    begin, end = methods["begin"][0], methods["end"][0]
    known = json.loads((runs / "all/0/end/report.json").read_text())
    assert end["KL to ref"] == pytest.approx(known["after"]["kl_ref"], abs=1e-9)
    assert end["below the frontier"] > -1e-6
    assert end["below the frontier"] < begin["below the frontier"]
    assert list(figures) == [f"{runs}/picture/family.png"]


def test_seeds_of_one_name_are_one_row_of_a_markdown_table(runs, figures, capsys, quoted, cells):
    """Two runs: their mean, the lower, the higher. The README's table has the same columns."""
    ends = [row["win rate"] for row in picture(runs)["methods"]["end"]]
    head, _, _, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  |")]
    low, high = sorted(ends)
    assert cells(line)[:2] == ["2 end", "2"]
    assert cells(head) == cells(quoted["python -m lab.methods.on_the_frontier out/all"][0])
    assert line.count("|") == 7
    assert f"| {(low + high) / 2:.4f} ({low:.4f} to {high:.4f}) |" in line


def test_the_distance_is_read_from_the_report_of_the_run_or_of_the_folder_above(tmp_path):
    (tmp_path / "kto").mkdir()
    (tmp_path / "kto/report.json").write_text('{"KL(answer||pi)": 0.5}')
    (tmp_path / "report.json").write_text('{"cpo": {"KL to its minimiser": 0.25}}')
    assert on_the_frontier.to_answer(tmp_path / "kto") == 0.5
    assert on_the_frontier.to_answer(tmp_path / "cpo") == 0.25
    assert on_the_frontier.to_answer(tmp_path / "none") is None


def test_runs_of_two_worlds_are_one_line(tmp_path, capsys):
    for world in ("bt3", "cyclic"):
        argv = ["--data", world, "--steps", "1", "--sft_steps", "1", "--pairs", "100"]
        assert ipo.main([*argv, "--out", f"{tmp_path}/{world}"]) == 0
    assert start.main("on_the_frontier", on_the_frontier.run, [str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "bt3" in said and "cyclic" in said


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert start.main("on_the_frontier", on_the_frontier.run, [str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
