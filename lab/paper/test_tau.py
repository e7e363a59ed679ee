"""Claims of lab/paper/grid.py and lab/common/pictures.py, each with its oracle."""
import json

import numpy as np
import pytest
import torch

import data
import ipo
import model
from lab.common import pictures
from lab.paper import grid

SHORT = ["--steps", "20", "--sft_steps", "5", "--pairs", "2000", "--batch_size", "16", "--log_every", "10"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A finished grid: two losses, two taus."""
    out = tmp_path_factory.mktemp("grid")
    assert grid.main([*SHORT, "--tau", "0.1", "1.0", "--out", str(out)]) == 0
    return out


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_run_in_a_grid_is_the_run_alone(cells, tmp_path, capsys):
    """Same flags to ipo.py: the same weights, log and report, bit for bit; and one reference for all runs."""
    assert ipo.main([*SHORT, "--loss", "dpo", "--tau", "1", "--out", str(tmp_path)]) == 0
    (alone, _), (cell, _) = (model.load(f"{folder}/ckpt.pt") for folder in (tmp_path, cells / "dpo-1"))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), cell.parameters(), strict=True))
    assert report(cells / "dpo-1") == report(tmp_path)
    assert (cells / "dpo-1/metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text()
    names = ["ipo-0.1", "ipo-1", "dpo-0.1", "dpo-1"]
    references = [torch.load(cells / name / "ref.pt", weights_only=True) for name in names]
    assert all(torch.equal(r["ref_logp"], references[0]["ref_logp"]) for r in references)
    assert list(report(cells)) == names and json.loads((cells / "ipo-1/config.json").read_text())["tau"] == 1


def test_the_table_is_made_of_the_reports(tmp_path, capsys):
    """A row per steps, its numbers medians over seeds, with the range of KL(pi||pi*)."""
    flags = ["--loss", "ipo", "--tau", "0.5", "--steps", "5", "10", "--seed", "0", "1", "2"]
    assert grid.main([*SHORT, *flags, "--data", "cyclic", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["median", "ipo-0.5-5", "ipo-0.5-10"]
    runs = [report(tmp_path / f"ipo-0.5-10-{seed}") for seed in range(3)]
    after = np.sort([[run["after"]["kl_ref"], run["after"]["kl_opt"]] for run in runs], axis=0)
    best = np.median([run["opt"]["kl_ref"] for run in runs])
    assert lines[2].split()[1:4] == [f"{number:.4f}" for number in (after[1, 0], best, after[1, 1])]
    assert lines[2].endswith(f"kl_opt {after[0, 1]:.4f} to {after[2, 1]:.4f}")
    assert report(tmp_path)["ipo-0.5-10"]["kl_opt"] == after[:, 1].tolist()


def test_infinite_is_above_every_number():
    """None counts as infinite in a median and in a range."""
    assert grid.spread([{"x": None}, {"x": 2.0}, {"x": 1.0}], "x") == (1.0, 2.0, None)
    assert grid.spread([{"x": None}, {"x": None}, {"x": 1.0}], "x") == (1.0, None, None)


def test_below_is_the_distance_to_the_best_policy_of_equal_kl(cells):
    """Bisection for the tau whose pi* has the run's KL(pi||ref) finds the win rate that was interpolated."""
    for name in ("ipo-0.1", "dpo-0.1"):
        after, source = report(cells / name)["after"], pictures.source_of(cells / name)
        low, high = 1e-3, 1e4
        for _ in range(80):
            tau = (low * high) ** 0.5
            best = data.optimum(source.ref, source.pstar, source.mu, tau)
            low, high = (tau, high) if data.kl(best, source.ref) > after["kl_ref"] else (low, tau)
        wins = (best.exp()[:, :, None] * source.mu[:, None, :] * source.pstar).sum((1, 2)).mean()
        assert report(cells)[name]["below"][1] == pytest.approx(wins.item() - after["win"], abs=5e-5)
        assert report(cells)[name]["below"][1] > 0


@pytest.mark.parametrize("world, mu", [("cyclic", "uniform"), ("cyclic", "ref"), ("deterministic", "uniform")])
def test_no_policy_beats_the_frontier(tmp_path, world, mu):
    """Random policies and optima of another Psi lie below, pi* of any tau on it; it goes on to the greedy policy."""
    assert ipo.main([*SHORT, "--data", world, "--mu", mu, "--steps", "1", "--out", str(tmp_path)]) == 0
    source = pictures.source_of(tmp_path)
    ref, pstar, mu = source.ref, source.pstar, source.mu
    kls, wins = pictures.frontier(source)
    assert list(kls) == sorted(kls) and kls[0] < 1e-6
    greedy = data.exact(data.optimum(ref, pstar / 1e-6, mu, 1.0), ref, {}, pstar, mu, ipo.psi, 1.0)
    assert wins[-1] == pytest.approx(greedy["win"], abs=1e-4) and kls[-1] == pytest.approx(greedy["kl_ref"], abs=1e-3)
    noise = torch.randn(ref.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = [(ref + scale * noise).log_softmax(-1) for scale in (0.1, 1.0, 3.0)]
    others += [data.optimum(ref, torch.logit(pstar), mu, tau) for tau in (0.3, 1.0, 3.0)]
    on_it = [data.optimum(ref, pstar, mu, tau) for tau in (0.001, 0.05, 0.2, 1.0)]
    for policy in others + on_it:
        n = data.exact(policy, ref, {}, pstar, mu, ipo.psi, 1.0)
        gap = np.interp(n["kl_ref"], kls, wins) - n["win"]
        assert abs(gap) < 2e-5 if any(policy is best for best in on_it) else gap > -2e-5


def test_the_source_of_a_run_is_what_it_trained_on(cells):
    """The exact numbers of pi* and the reference, and those over all pairs, are the report's again."""
    for name in ("ipo-1", "dpo-0.1"):
        source = pictures.source_of(cells / name)
        assert source.numbers(source.ref) == report(cells / name)["before"]
        assert source.numbers(source.exact["opt"]) == report(cells / name)["opt"]


def test_pictures_show_the_measured_numbers(cells, figures):
    """Curves are the reference, then metrics.jsonl; dashed the target; diamonds pi*; one frontier."""
    assert pictures.main([str(cells)]) == 0
    margin, kl, win = figures[f"{cells}/runs.png"].axes
    run = pictures.read(str(cells / "ipo-0.1"))
    lines = [json.loads(line) for line in (cells / "ipo-0.1/metrics.jsonl").read_text().splitlines()]
    assert run.steps == (0, 10, 20) and run.evals == (run.report["before"], *(line["eval"] for line in lines))
    for axis, x, y in ((margin, run.steps, "h"), (kl, run.steps, "kl_ref"), (win, None, "win")):
        drawn = [[list(values) for values in line.get_data()] for line in axis.lines]
        curve = [numbers[y] for numbers in run.evals]
        assert [list(x or [numbers["kl_ref"] for numbers in run.evals]), curve] in drawn
        assert [run.report["opt"][y]] in [values[1] for values in drawn]
    dashed = [line.get_ydata()[0] for line in margin.lines if list(line.get_xdata()) == [0, 1]]
    assert dashed == pytest.approx([5, 0.5])  # 1/(2 tau); for dpo infinite
    assert [len(line.get_xdata()) for line in win.lines].count(600) == 1
    looks = {(line.get_color(), line.get_linestyle()) for line in kl.lines if len(line.get_xdata()) == 3}
    assert len(looks) == 4
    legend, = figures[f"{cells}/runs.png"].legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert sorted(texts[:4]) == ["dpo, tau 0.1", "dpo, tau 1", "ipo, tau 0.1", "ipo, tau 1"]
    assert texts[4:] == ["mean target", "exact pi*", "exact frontier"]


def test_runs_on_files_and_unfinished_runs_are_drawn(tmp_path, figures, monkeypatch):
    """Held-out accuracy instead of KLs; without a report the curve begins at the first evaluation."""
    pairs = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    flags = ["--data", str(tmp_path / "pairs.jsonl"), "--tokenizer", "bytes", "--block_size", "16"]
    flags += ["--n_layer", "1", "--n_embd", "8", "--sft_steps", "2", "--steps", "4", "--log_every", "2"]
    assert grid.main([*flags, "--tau", "0.1", "--out", str(tmp_path / "grid")]) == 0
    (tmp_path / "grid/dpo-0.1/report.json").unlink()
    assert pictures.main([str(tmp_path / "grid"), "--out", str(tmp_path / "pictures")]) == 0
    _, accuracy = figures[f"{tmp_path}/pictures/runs.png"].axes
    assert sorted(len(line.get_xdata()) for line in accuracy.lines) == [2, 3]
    assert accuracy.get_ylabel() == "accuracy, held out" and accuracy.lines[0].get_ydata()[0] == 0.5
    row = report(tmp_path / "grid")["ipo-0.1"]
    assert "accuracy" in row and "below" not in row


def test_a_picture_without_margins(tmp_path, figures):
    """Under --logp mean a world reports no h: KL and frontier remain."""
    assert ipo.main([*SHORT, "--logp", "mean", "--out", str(tmp_path)]) == 0
    assert pictures.main([str(tmp_path)]) == 0
    kl, win = figures[f"{tmp_path}/runs.png"].axes
    assert [axis.get_ylabel() for axis in (kl, win)] == ["KL(pi||ref), nats", "win rate against mu"]
    assert 600 in [len(line.get_xdata()) for line in win.lines]


def test_files_become_a_png(cells, tmp_path):
    """What lies in the folder is a picture."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert pictures.main([str(cells / "ipo-1"), "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new/runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_stops_leaves_the_others(tmp_path, monkeypatch, capsys):
    """A loss whose slope at 0 is infinite: its row is missing, the status is 1, the other row is there."""
    monkeypatch.setitem(ipo.LOSSES, "cusp", lambda h, p, tau: h.abs().sqrt())
    assert grid.main([*SHORT, "--loss", "cusp", "ipo", "--tau", "1", "--out", str(tmp_path)]) == 1
    assert list(report(tmp_path)) == ["ipo-1"] and "cusp-1: step 1: " in capsys.readouterr().out


def test_a_grid_goes_on_where_it_was(cells, tmp_path, capsys):
    """Without two of its runs, --resume makes these and gives the same table."""
    flags = [*SHORT, "--tau", "0.1", "1", "--loss", "ipo", "--out", str(tmp_path)]
    assert grid.main(flags) == 0
    whole = (tmp_path / "report.json").read_text()
    (tmp_path / "ipo-1/report.json").unlink()
    (tmp_path / "report.json").unlink()
    assert grid.main(flags) == 2 and "--resume" in capsys.readouterr().err  # unfinished: not replaced
    assert grid.main([*flags, "--resume"]) == 0 and (tmp_path / "report.json").read_text() == whole
    for file in (tmp_path / "ipo-1").iterdir():
        file.unlink()
    assert grid.main([*flags, "--resume"]) == 0 and (tmp_path / "report.json").read_text() == whole


def test_bad_input_ends_in_a_line_before_anything_runs(tmp_path, capsys):
    """Exit status 2; no folder was made."""
    for flags in (["--loss", "ipo", "nope"], ["--tau", "0.1", "-1"], ["--tau", "x"], ["--steps", "5", "0"],
                  ["--nope", "1"], ["--sample", "review"]):
        assert grid.main([*flags, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("grid.py: ") and error.count("\n") == 1 and not (tmp_path / "out").exists()
    for name, text in (("config.json", "{}"), ("metrics.jsonl", "{")):
        assert pictures.main([str(tmp_path)]) == 2 and capsys.readouterr().err.startswith("plot.py: ")
        (tmp_path / name).write_text(text)
    assert pictures.main([str(tmp_path)]) == 2 and "not the files of a run" in capsys.readouterr().err
