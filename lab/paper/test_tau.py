"""Claims of lab/paper/tau.py, each with its oracle."""
import json

import pytest
import torch

import data
import ipo
import model
from lab.common import pictures, start
from lab.paper import tau

SHORT = ["--steps", "20", "--sft_steps", "5", "--pairs", "2000", "--batch_size", "32", "--log_every", "10"]
NAMES = ["ipo-0.1", "ipo-1", "dpo-0.1", "dpo-1"]


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Worlds with 13 responses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.World.__init__, "__defaults__", (["superb", "dull", "hot"], (0, 1/4, 3/4)))
        yield


@pytest.fixture(scope="module")
def grid(tiny, tmp_path_factory):
    """A finished grid: two losses, two taus."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    out = tmp_path_factory.mktemp("tau")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "psi", lambda q: q)
        tau.run([*SHORT, "--tau", "0.1", "1.0", "--out", str(out)])
    return out


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_there_is_a_row_for_each_run(grid):
    assert list(report(grid)["table"]) == NAMES


def test_a_run_in_a_grid_is_the_run_alone(grid, tmp_path):
    """Same flags to ipo.py: the same weights, bit for bit."""
    ipo.run(ipo.parse([*SHORT, "--loss", "dpo", "--tau", "1", "--out", str(tmp_path)]))
    alone, _ = model.load(f"{tmp_path}/ckpt.pt")
    ours, _ = model.load(f"{grid}/dpo-1/ckpt.pt")
    for one, other in zip(ours.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_all_runs_of_a_seed_have_one_reference(grid):
    first, *others = [model.read(f"{grid}/{name}/ref.pt")["ref_logp"] for name in NAMES]
    assert all(torch.equal(first, other) for other in others)


def test_the_readme_s_table_has_the_rows_and_columns_of_the_program(quoted, cells):
    _, runs = tau.plan([])
    head, _, *rows = [cells(line) for line in quoted["python -m lab.paper.tau"]]
    assert head[1:] == list(tau.COLUMNS.values())
    assert [row[0] for row in rows] == list(runs)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_reports_numbers(grid, name):
    row, run = report(grid)["table"][name], report(grid / name)
    assert row["kl_ref"] == pytest.approx(run["after"]["kl_ref"], abs=1e-6)
    assert row["kl_opt"] == pytest.approx(run["after"]["kl_opt"], abs=1e-6)
    assert row["opt kl_ref"] == pytest.approx(run["opt"]["kl_ref"], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_below_is_the_distance_to_the_best_policy_of_equal_kl(grid, name):
    """Bisection for the tau whose pi* has the run's KL to the reference."""
    row, source = report(grid)["table"][name], pictures.source_of(grid / name)
    low, high = 1e-3, 1e4
    for _ in range(80):
        middle = (low * high) ** 0.5
        best = data.optimum(source.exact["ref"], source.pstar, source.mu, middle)
        if data.kl(best, source.exact["ref"]) > row["kl_ref"]:
            low = middle
        else:
            high = middle
    joint = best.exp()[:, :, None] * source.mu[:, None, :] * source.pstar
    most = joint.sum((1, 2)).mean().item()
    assert row["below"] == pytest.approx(most - row["win"], abs=5e-5)


def test_the_answer_says_how_far_each_loss_goes(grid):
    answer, table = report(grid)["answer"], report(grid)["table"]
    assert f"ipo ends {table['ipo-0.1']['kl_ref']:.3f} (tau 0.1)" in answer
    assert f"to {table['dpo-1']['kl_ref']:.3f} (tau 1)" in answer


def test_one_run_has_one_end(tmp_path, figures):
    tau.run([*SHORT, "--loss", "ipo", "--tau", "1", "--out", str(tmp_path)])
    assert report(tmp_path)["answer"].count("(tau 1)") == 1


def test_what_is_infinitely_far_is_a_dash(tmp_path, figures, capsys, cells):
    """DPO's pi* on certain preferences."""
    tau.run([*SHORT, "--data", "deterministic", "--loss", "dpo", "--tau", "1", "--out", str(tmp_path)])
    row = cells(capsys.readouterr().out.splitlines()[-1])
    assert report(tmp_path)["table"]["dpo-1"]["kl_opt"] is None
    assert row[3] == "-"


def test_the_picture_lies_beside_the_report(grid):
    assert (grid / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_every_seed_has_its_row(tmp_path, figures, capsys, cells):
    tau.run([*SHORT, "--loss", "ipo", "--tau", "0.5", "--seed", "0", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"run 1/2: {tmp_path}/ipo-0.5-0", f"run 2/2: {tmp_path}/ipo-0.5-1"]
    assert [cells(line)[0] for line in said[-2:]] == ["ipo-0.5-0", "ipo-0.5-1"]


def test_a_run_that_stops_leaves_the_others(tmp_path, monkeypatch, figures, capsys):
    """A loss whose slope at 0 is infinite in place of DPO's: its row is missing, the status is 1."""
    monkeypatch.setitem(ipo.LOSSES, "dpo", lambda h, p, tau: h.abs().sqrt())
    assert start.main("tau", tau.run, [*SHORT, "--tau", "1", "--out", str(tmp_path)]) == 1
    assert list(report(tmp_path)["table"]) == ["ipo-1"]
    assert "some runs had to stop" in capsys.readouterr().err


BAD = [
    (["--loss", "ipo", "nope"], "--loss is 'nope'"),
    (["--tau", "0.1", "-1"], "--tau is '-1'"),
    (["--tau", "0.1", ".1"], "0.1 is given twice"),
    (["--tau", "x"], "--tau"),
    (["--steps", "5", "0"], "--steps is '0'"),
    (["--sample", "review"], "--sample does nothing"),
    (["--data", "pairs.jsonl"], "invalid choice: 'pairs.jsonl'"),
]


@pytest.mark.parametrize("flags, why", BAD)
def test_bad_input_is_one_line_before_anything_runs(tmp_path, capsys, flags, why):
    assert start.main("tau", tau.run, [*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tau: ") and error.count("\n") == 1
    assert why in error
    assert not (tmp_path / "out").exists()
