"""Claims of lab/models/export.py; the oracles are transformers' GPT-2 and tiktoken.
"""
from argparse import Namespace

import pytest
import torch
import transformers

import data
import ipo
import model
from lab.common import start
from lab.models import export

TEXTS = ["Hello world, it's 12345  tokens\n\n  of text.\t", "na\u00efve \U0001f642 \u4f60\u597d",
         "<|endoftext|> x"]


def saved(path, sizes, tokenizer="bytes"):
    """A run's file of a random policy with large weights."""
    torch.manual_seed(0)
    policy = model.GPT(model.GPTConfig(*sizes))
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save(str(path), policy, Namespace(tokenizer=tokenizer))
    return policy


def main(*argv):
    return start.main("export", export.run, [str(word) for word in argv])


@torch.no_grad()
def test_transformers_has_equal_logits(tmp_path):
    policy = saved(tmp_path / "ckpt.pt", (16, 257, 257, 2, 2, 32))
    assert main(tmp_path / "ckpt.pt", tmp_path / "out") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(257, (3, 16))
    logits = policy(tokens)
    assert logits.std() > 0.1
    assert torch.allclose(theirs(tokens).logits, logits, rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == 256


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_tokenizer_has_equal_ids(tmp_path, name):
    """Also of a written-out end of text, which a text may hold."""
    encoding = data.get_tokenizer(name)
    export.save_tokenizer(encoding, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = encoding.encode_ordinary(text)
        assert theirs.encode(text, split_special_tokens=True) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == encoding.eot_token


@torch.no_grad()
def test_the_core_starts_from_an_export(tmp_path):
    """Of a policy with GPT-2's vocabulary: there and back, the weights are the same."""
    policy = saved(tmp_path / "ckpt.pt", (8, 50257, 50257, 1, 2, 8), "gpt2")
    assert main(tmp_path / "ckpt.pt", tmp_path / "out") == 0
    back, name = model.load(str(tmp_path / "out"))
    assert name == "gpt2"
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in policy.state_dict().items())


def test_a_worlds_policy_stays_here(tmp_path, capsys):
    """Its head is smaller than its vocabulary."""
    out = str(tmp_path / "world")
    assert ipo.main(["--pairs", "9", "--steps", "1", "--sft_steps", "0", "--out", out]) == 0
    assert main(f"{out}/ckpt.pt", tmp_path / "out") == 2
    assert "a world's policy emits 8 ids" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_replaced(tmp_path, capsys):
    """It may be the user's own."""
    saved(tmp_path / "ckpt.pt", (16, 257, 257, 1, 2, 8))
    assert main(tmp_path / "ckpt.pt", tmp_path) == 2
    assert "is there and not empty; name a new folder" in capsys.readouterr().err


def test_a_run_of_hf_and_no_run_are_named(tmp_path, capsys):
    """Each in one line."""
    policy = torch.nn.Linear(1, 1)
    policy.config = Namespace(block_size=4, vocab_size=9)
    model.save(str(tmp_path / "hf.pt"), policy, Namespace(tokenizer="hf:x"))
    assert main(tmp_path / "hf.pt", tmp_path / "out") == 2
    assert "a run of lab.models.hf leaves a folder, OUT/export" in capsys.readouterr().err
    assert main(tmp_path / "none.pt", tmp_path / "out") == 2
    assert "none.pt" in capsys.readouterr().err
