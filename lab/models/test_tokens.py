"""Claims of lab/models/tokens.py: what it prints of a file is what a run on it reads.
"""
import json

import pytest

from lab.common import start
from lab.models import test_hf, tokens


def show(capsys, *argv):
    """What the program prints, which has to succeed."""
    capsys.readouterr()
    assert start.main("tokens", tokens.run, argv) == 0
    return capsys.readouterr().out


def write(tmp_path, *items):
    return test_hf.write(tmp_path / "pairs.jsonl", *items)


def test_the_response_is_scored_and_the_prompt_is_not(tmp_path, capsys):
    """Token by token, end of text included; the last line counts them."""
    path = write(tmp_path, {"prompt": "Q?\n", "chosen": " yes", "rejected": ""})
    said = show(capsys, "--data", path, "--tokenizer", "bytes").splitlines()
    assert "  prompt      3 tokens, not scored: |Q|?|\\n|" in said
    assert "  chosen      5 tokens, scored: | |y|e|s|<|endoftext|>|" in said
    assert "  rejected    1 tokens, scored: |<|endoftext|>|" in said
    assert said[-1].startswith("Of 12 tokens in 1 pairs 6 are scored")
    assert said[-1].endswith("The longest row has 8 of at most 256 tokens.")


def test_different_tokens_look_different(tmp_path, capsys):
    """Tokens that are single bytes of these letters, which a replacement sign would hide."""
    path = write(tmp_path, {"prompt": "\u4f60\u597d", "chosen": "\u597d\U0001f600", "rejected": "\u4e0d"})
    said = show(capsys, "--data", path, "--tokenizer", "bytes")
    assert r"|\xe4|\xbd|\xa0|\xe5|\xa5|\xbd|" in said
    assert r"|\xe5|\xa5|\xbd|\xf0|\x9f|\x98|\x80|<|endoftext|>|" in said
    assert r"|\xe4|\xb8|\x8d|" in said


def test_what_is_cut_is_told(tmp_path, capsys):
    """The prompt's end stays, as in a run."""
    path = write(tmp_path, {"prompt": "0123456789", "chosen": "abc", "rejected": "d"})
    said = show(capsys, "--data", path, "--tokenizer", "bytes", "--block_size", "8")
    assert "  prompt      4 tokens, 6 more are cut: |6|7|8|9|" in said


def test_a_dropped_pair_says_why(tmp_path, capsys):
    """Two equal responses; the other pair is shown."""
    path = write(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "b"},
                 {"prompt": "a", "chosen": "b", "rejected": "c"})
    said = show(capsys, "--data", path, "--tokenizer", "bytes").split("\npair ")
    assert "1 pairs dropped: chosen and rejected are the same tokens" in said[1]
    assert "scored: |c|" in said[2]


def test_conversations_are_shown_as_the_model_reads_them(tmp_path, capsys):
    """The chat template's texts in the tokens of the model's tokenizer; bytes where a token is no letter."""
    test_hf.random_model(tmp_path / "in")
    test_hf.byte_tokenizer(tmp_path / "in")
    pair = test_hf.FOUR[0] | {"rejected": [{"role": "assistant", "content": "\u00e9"}]}
    said = show(capsys, "--data", write(tmp_path, pair), "--init_from", str(tmp_path / "in"))
    assert r"|<|im_start|>|u|s|e|r|\n|H|i|<|im_end|>|\n|<|im_start|>|" in said
    assert r"scored: |\xc3|\xa9|<|im_end|>|" in said
    assert "at most 63 tokens" in said


def test_marks_of_a_space_are_shown(tmp_path, capsys):
    """SentencePiece's: a token with a space looks different from one without."""
    test_hf.random_model(tmp_path / "in")
    test_hf.space_tokenizer(tmp_path / "in")
    path = write(tmp_path, {"prompt": "a", "chosen": " Blue", "rejected": "b"})
    said = show(capsys, "--data", path, "--init_from", str(tmp_path / "in"))
    assert "scored: |\u2581Bl|ue|</s>|" in said
    assert "scored: |b|</s>|" in said


@pytest.mark.parametrize("argv, words", [
    ([], "--data"),
    (["--data", "none.jsonl", "--tokenizer", "bytes"], "none.jsonl: no such file"),
    (["--data", "PAIRS", "--tokenizer", "bytes", "--block_size", "-1"], "every pair was dropped"),
    (["--data", "PAIRS", "--tokenizer", "bytes", "--init_from", "x"], "--block_size do nothing"),
    (["--data", "PAIRS", "--init_from", "none/such"], "there is no such folder"),
    (["--data", "PAIRS", "--init_from", "none.pt"], "none.pt"),
    (["--data", "PAIRS", "--tokenizer", "no"], "--tokenizer no")])
def test_what_cannot_be_shown_is_a_line(tmp_path, argv, words, capsys):
    path = write(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    argv = [path if word == "PAIRS" else word for word in argv]
    assert start.main("tokens", tokens.run, argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("tokens: ")
    assert words in line


def test_a_broken_line_is_named(tmp_path, capsys):
    """As ipo.py names it."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": 5, "rejected": "c"}))
    argv = ["--data", str(tmp_path / "pairs.jsonl"), "--tokenizer", "bytes"]
    assert start.main("tokens", tokens.run, argv) == 2
    assert "pairs.jsonl:1: 'chosen' is 5" in capsys.readouterr().err
