"""Claims of lab/models/bench.py; the oracle is TRL, whose losses must be ours.
"""
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tiktoken
import torch
import transformers

import data
from lab.common import start
from lab.models import bench


def write_pairs(path, soft=False, yes=" yes", no=" no"):
    """24 pairs with responses of different lengths."""
    lines = []
    for i in range(24):
        pair = {"prompt": f"say {i % 7}:", "chosen": yes * (1 + i % 3), "rejected": no * (1 + i % 4)}
        more = {"p": i / 23} if soft else {}
        lines.append(json.dumps(pair | more))
    path.write_text("\n".join(lines))
    return str(path)


def random_gpt2(folder, vocabulary="gpt2"):
    """A random GPT-2 of 64 tokens as transformers saves it, with tiktoken's ids in its tokenizer."""
    from transformers.convert_slow_tokenizer import TikTokenConverter
    encoding = data.get_tokenizer(vocabulary)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": encoding.eot_token, "eos_token_id": encoding.eot_token}
    config = transformers.GPT2Config(vocab_size=encoding.n_vocab, **sizes, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    pattern = encoding._pat_str.removeprefix("(?s)")  # an option that their regular expressions lack
    converter = TikTokenConverter(None, pattern, extra_special_tokens=[data.EOT])
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # it would read a file
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=data.EOT, eos_token=data.EOT)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def gpt2_without_a_network():
    """As many ids as GPT-2 has: single bytes, and others that no text makes. The real table is a download."""
    ids = {bytes([byte]): byte for byte in range(256)}
    for number in range(256, 50256):
        ids[b"\xff\xfe" + number.to_bytes(4, "big")] = number
    encoding = tiktoken.Encoding("gpt2", pat_str="(?s).", mergeable_ranks=ids,
                                 special_tokens={data.EOT: 50256})
    with mock.patch.object(data.tiktoken, "get_encoding", lambda name: encoding):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_gpt2(tmp_path_factory.mktemp("gpt2"))


def test_trl_computes_the_same_losses(folder, tmp_path, monkeypatch):
    """Two independent programs, one sequence of losses: so the times are of the same work."""
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.setattr(bench, "RATE", 1e-3)
    monkeypatch.setattr(bench.ipo, "DEVICE", "cpu")
    path = write_pairs(tmp_path / "pairs.jsonl", yes="y", no="n")
    args, found = bench.parse(["--data", path, "--init_from", folder, "--out", str(tmp_path / "out")])
    losses, marks = bench.ours(args, found)
    theirs, their_marks = bench.theirs(args, found)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < 0.69
    assert theirs == pytest.approx(losses, rel=1e-5)
    assert len(marks) == len(their_marks) == 6


def test_a_turn_is_a_line_of_json(folder, tmp_path, capsys):
    """Seconds of a step, memory, losses; no file is left."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = ["--data", path, "--init_from", folder, "--side", "ours"]
    assert start.main("bench", bench.run, argv) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert 0 < numbers["seconds"] < 10
    assert 0.05 < numbers["GiB"] < 100
    assert len(numbers["losses"]) == 6
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.fixture
def measured(folder, tmp_path, monkeypatch, capsys):
    """What the program prints if a step takes us 2 seconds and TRL 6, and the sides that had their turn."""
    seconds, sides = iter([2, 6]), []

    def turn(command, **more):
        sides.append(command[-1])
        s = next(seconds)
        line = json.dumps({"seconds": s, "GiB": 2.0, "losses": [0.5, 0.4 + s / 1000]})
        return SimpleNamespace(returncode=0, stdout="noise\n" + line)

    monkeypatch.setattr(subprocess, "run", turn)
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = ["--data", path, "--init_from", folder, "--out", str(tmp_path / "out")]
    assert start.main("bench", bench.run, argv) == 0
    return capsys.readouterr().out.splitlines(), sides


def test_the_answer_has_the_ratios(measured):
    """Ours, then TRL, each a process."""
    printed, sides = measured
    assert sides == ["ours", "TRL"]
    assert ("TRL needs 3 times our seconds a step and 1 times our memory. "
            "The losses differ by at most 0.004.") in printed


def test_the_row_is_of_this_model_and_these_pairs(measured, folder, cells):
    printed, _ = measured
    assert cells(printed[-1]) == [f"{Path(folder).name}, pairs", "2", "6", "3", "2", "2", "1"]


def test_the_readme_s_table_is_what_the_program_prints(measured, quoted, cells):
    """Its head, and numbers of three digits at most."""
    printed, _ = measured
    page = quoted["python -m lab.models.bench --init_from FOLDER --data FILE.jsonl"]
    assert cells(page[0]) == cells(printed[-3])
    for row in page[2:]:
        _, *numbers = cells(row)
        assert numbers == [f"{float(number):.3g}" for number in numbers]


def test_the_readme_makes_a_gpt2(folder, tmp_path, monkeypatch):
    """Its tokenizer comes from a folder here, and not from the hub."""
    page = Path(bench.__file__).with_name("README.md").read_text()
    program = page.split("python - <<END\n")[1].split("END\n")[0]
    monkeypatch.chdir(tmp_path)
    exec(program.replace('"gpt2"', f'"{folder}"'))
    policy, _ = bench.model.load("gpt2_7m")
    assert [policy.config.n_layer, policy.config.n_head, policy.config.n_embd] == [4, 4, 128]
    assert transformers.AutoTokenizer.from_pretrained("gpt2_7m").eos_token == data.EOT


@pytest.mark.parametrize("change, words", [
    (["--data", "FEW"], "1 unequal pairs; give 24 or more"), (["--data", "bt"], "bt: no such"),
    (["--loss", "ipo"], "--loss")])
def test_bad_input_is_a_line(change, words, folder, tmp_path, capsys):
    """Exit status 2, one line that names what is wrong."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    change = [str(few) if word == "FEW" else word for word in change]
    assert start.main("bench", bench.run, ["--data", path, "--init_from", folder, *change]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ")
    assert words in line


def test_a_side_that_fails_is_a_line(tmp_path, capsys):
    """Its last line stands in ours. It is a process of its own, which ends before transformers is loaded."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = ["--data", path, "--init_from", "no.pt", "--out", str(tmp_path / "out")]
    assert start.main("bench", bench.run, argv) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ours failed: bench: no.pt: not what a run saved")


def test_a_side_that_is_killed_is_a_line(folder, tmp_path, monkeypatch, capsys):
    """As Linux does if memory is short: nothing is said."""
    killed = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **more: killed)
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = ["--data", path, "--init_from", folder, "--out", str(tmp_path / "out")]
    assert start.main("bench", bench.run, argv) == 1
    assert "ours failed: killed, perhaps for its memory" in capsys.readouterr().err
