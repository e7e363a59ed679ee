"""Claims of lab/models/bench.py; the oracle is TRL, whose losses must be ours.
"""
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

import data
import model
from lab.common import start
from lab.models import bench, export


def write_pairs(path, soft=False):
    """24 pairs with responses of different lengths."""
    lines = []
    for i in range(24):
        pair = {"prompt": f"say {i % 7}:", "chosen": " yes" * (1 + i % 3), "rejected": " no" * (1 + i % 4)}
        more = {"p": i / 23} if soft else {}
        lines.append(json.dumps(pair | more))
    path.write_text("\n".join(lines))
    return str(path)


def random_gpt2(folder, vocabulary="gpt2"):
    """A random GPT-2 of 64 tokens as transformers saves it, with its tokenizer."""
    encoding = data.get_tokenizer(vocabulary)
    torch.manual_seed(0)
    V = encoding.n_vocab
    policy = model.GPT(model.GPTConfig(64, V, V, 2, 2, 32))
    export.save_model(policy, encoding.eot_token, folder)
    export.save_tokenizer(encoding, folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("best", [False, True])
def test_trl_computes_the_same_losses(best, folder, tmp_path, monkeypatch):
    """Two independent programs, one sequence of losses: so the times are of the same work."""
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.setattr(bench, "RATE", 1e-3)
    path = write_pairs(tmp_path / "pairs.jsonl")
    args = bench.parse(["--data", path, "--init_from", folder, "--device", "cpu"])
    found = bench.pairs_of(args)
    losses, marks = bench.ours(args, found)
    theirs, their_marks = bench.theirs(args, found, best)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.69
    assert theirs == pytest.approx(losses, rel=1e-5)
    assert len(marks) == len(their_marks) == 6


def test_a_turn_is_a_line_of_json(folder, tmp_path, capsys):
    """Seconds of a step, memory, losses; no file is left."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = ["--data", path, "--init_from", folder, "--side", "ours", "--device", "cpu"]
    assert start.main("bench", bench.run, argv) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert 0 < numbers["seconds"] < 10
    assert 0.05 < numbers["GiB"] < 100
    assert len(numbers["losses"]) == 6
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_turns_and_ratios(folder, tmp_path, monkeypatch, capsys):
    """Ours, TRL, TRL at its best, and again. Ratios are of one round: 2 and 4, then 1 and 1."""
    seconds, sides = iter([1, 2, 1, 2, 8, 2]), []

    def turn(command, **more):
        sides.append(command[-1])
        s = next(seconds)
        line = json.dumps({"seconds": s, "GiB": 2.0, "losses": [0.5, 0.4 + s / 1000]})
        return SimpleNamespace(returncode=0, stdout="noise\n" + line)

    monkeypatch.setattr(subprocess, "run", turn)
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = ["--data", path, "--init_from", folder, "--rounds", "2"]
    assert start.main("bench", bench.run, argv) == 0
    assert sides == 2 * ["ours", "trl", "best"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        "TRL needs 3.0 times our seconds as it comes and 1.0 times at its best, and 1.0 and 1.0 times our "
        "memory. The losses differ by at most 0.006.")


@pytest.mark.parametrize("change, words", [
    (["--rounds", "0"], "--rounds is 0; it takes 1 and more"), (["--steps", "3"], "--steps is 3; it takes 4"),
    (["--steps", "7"], "24 pairs; --steps 7 of --batch_size 4 need 28"), (["--data", "bt"], "bt: no such"),
    (["--data", "SOFT"], "TRL knows no p"), (["--rounds", "x"], "--rounds"), (["--loss", "ipo"], "--loss")])
def test_bad_input_is_a_line(change, words, folder, tmp_path, capsys):
    """Exit status 2, one line that names what is wrong."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    soft = write_pairs(tmp_path / "soft.jsonl", soft=True)
    change = [soft if word == "SOFT" else word for word in change]
    assert start.main("bench", bench.run, ["--data", path, "--init_from", folder, *change]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ")
    assert words in line


def test_a_side_that_fails_is_a_line(tmp_path, capsys):
    """Its last line stands in ours."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    assert start.main("bench", bench.run, ["--data", path, "--init_from", "no/such"]) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ours failed: bench: --init_from no/such")
