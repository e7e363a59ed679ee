"""Claims of lab/common/pictures.py: what is drawn is what was measured, and what cannot be drawn is named."""
import json
import shutil

import pytest
import torch

import data
import ipo
from lab.common import pictures, start

SHORT = ["--steps", "20", "--sft_steps", "5", "--pairs", "2000", "--batch_size", "64", "--log_every", "10"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two finished runs in the world."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "psi", lambda q: q)
        for loss in ("ipo", "dpo"):
            ipo.run(ipo.parse([*SHORT, "--loss", loss, "--out", f"{out}/{loss}"]))
    return out


@pytest.fixture(scope="module")
def panels(runs):
    """The panels of the picture of both runs."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save", lambda figure, path: saved.append(figure))
        pictures.run([str(runs)])
    return saved[0].axes


def report(folder):
    return json.loads((folder / "report.json").read_text())


def drawn(axis):
    """The points of each line."""
    return [list(zip(*line.get_data())) for line in axis.lines]


@pytest.mark.parametrize("loss", ["ipo", "dpo"])
@pytest.mark.parametrize("panel, name", [(0, "h"), (1, "kl_ref")])
def test_a_curve_is_the_log(runs, panels, loss, panel, name):
    """It begins at the reference, where both are 0."""
    log = report(runs / loss)["log"]
    curve = [(0, 0.0)] + [(line["step"], line[name]) for line in log]
    assert curve in drawn(panels[panel])


@pytest.mark.parametrize("loss", ["ipo", "dpo"])
def test_a_diamond_is_pi_star(runs, panels, loss):
    assert [(20, report(runs / loss)["opt"]["h"])] in drawn(panels[0])


def test_the_dashed_line_is_what_a_hard_label_asks_for(panels):
    """1 / (2 tau) at tau .2, for IPO alone."""
    assert [(0, 2.5), (1, 2.5)] in drawn(panels[0])


def test_a_world_s_runs_show_margin_and_distance(panels):
    assert [axis.get_ylabel() for axis in panels] == ["margin h, nats", "KL(pi||ref), nats"]


def test_the_source_of_a_run_is_what_it_trained_on(runs):
    source = pictures.source_of(runs / "dpo")
    assert source.numbers(source.exact["opt"]) == report(runs / "dpo")["opt"]


def test_an_unfinished_run_is_drawn(runs, tmp_path, figures):
    for name in ("ref.pt", "ckpt.pt"):
        (tmp_path / name).write_bytes((runs / "ipo" / name).read_bytes())
    pictures.run([str(tmp_path)])
    assert len(drawn(figures[f"{tmp_path}/runs.png"].axes[0])[0]) == 3


def test_a_file_s_run_shows_its_accuracy(tmp_path, figures):
    pairs = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    flags = "--tokenizer bytes --block_size 16 --n_layer 1 --n_embd 8 --sft_steps 2 --steps 4 --log_every 2"
    ipo.run(ipo.parse(["--data", f"{tmp_path}/pairs.jsonl", *flags.split(), "--out", f"{tmp_path}/run"]))
    pictures.run([f"{tmp_path}/run"])
    labels = [axis.get_ylabel() for axis in figures[f"{tmp_path}/run/runs.png"].axes]
    assert labels == ["margin h, nats", "accuracy, held out"]


def test_files_become_a_png(runs, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    pictures.run([str(runs / "ipo"), "--out", str(tmp_path / "new")])
    assert (tmp_path / "new/runs.png").read_bytes().startswith(b"\x89PNG")


def refusal(out, capsys):
    """What the program says of this folder, in one line."""
    assert start.main("pictures", pictures.run, [str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pictures: ") and said.count("\n") == 1
    return said


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert "no such folder" in refusal(tmp_path / "nope", capsys)


def test_a_folder_without_a_run_says_what_is_there(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert "no ckpt.pt here or one folder below, but notes.txt" in refusal(tmp_path, capsys)


@pytest.mark.parametrize("text", ["{", "5", "[1]", "\xff"])
def test_a_damaged_report_is_named_and_its_remedy_works(text, runs, tmp_path, capsys, figures):
    shutil.copytree(runs / "ipo", tmp_path / "run")
    path = tmp_path / "run/report.json"
    path.write_bytes(text.encode("latin-1"))
    said = refusal(tmp_path / "run", capsys)
    assert f"{path} is damaged (" in said
    assert said.endswith("); remove it\n")
    path.unlink()
    pictures.run([str(tmp_path / "run")])
    assert f"{tmp_path}/run/runs.png" in figures


def test_a_ref_pt_without_a_reference_is_named(runs, tmp_path):
    """One that was stopped in SFT, or another file under this name."""
    shutil.copy(runs / "ipo/ckpt.pt", tmp_path / "ref.pt")
    with pytest.raises(data.Refused, match="has no reference; name a run in a world"):
        pictures.source_of(tmp_path)


def test_a_log_without_what_is_drawn_is_refused(tmp_path, capsys):
    policy = torch.nn.Linear(1, 1)
    policy.config = ipo.model.GPTConfig(1024, 50257, 50257, 12, 12, 768)
    flags = ipo.parse(["--out", str(tmp_path)])
    ipo.model.save(f"{tmp_path}/ckpt.pt", policy, flags, log=[{"step": 1, "reward": 2.0}])
    assert "no number in common that can be drawn" in refusal(tmp_path, capsys)
