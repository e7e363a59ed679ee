"""Claims of lab/models/bench.py and lab/models/peer.py; the oracles are transformers' GPT-2, torch's counter of operations, TRL.
"""
import json
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

import data
import ipo
import model
from lab.models import bench

BYTES = data.get_tokenizer("bytes")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random GPT-2 that reads bytes, as transformers saves it, and a tokenizer with the ids of BYTES."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers makes the tests' tokenizer")
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    path = str(tmp_path_factory.mktemp("gpt2"))
    ids = {name: 1 + byte for byte, name in convert.bytes_to_unicode().items()}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ids | {data.EOT: 0}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=data.EOT).save_pretrained(path)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=257, n_positions=64, n_layer=2, n_head=2, n_embd=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0)).save_pretrained(path)
    return path


def write_pairs(path, soft=False):
    """20 pairs with responses of different lengths."""
    lines = []
    for i in range(20):
        pair = {"prompt": f"say {i % 7}:", "chosen": " yes" * (1 + i % 3), "rejected": " no" * (1 + i % 4)}
        lines.append(json.dumps(pair | ({"p": i / 19} if soft else {})))
    path.write_text("\n".join(lines))
    return str(path)


def flags(path, *more):
    return ["--data", path, "--tokenizer", "bytes", "--steps", "5", "--batch_size", "4", "--lr", "1e-3",
            "--tau", "0.1", "--device", "cpu", "--threads", "1", *more]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small matrices give the machine's rate."""
    monkeypatch.setattr(bench, "matmul_rate", partial(bench.matmul_rate, n=256))


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_losses_are_those_of_a_plain_loop(form, folder, tmp_path, capsys):
    """transformers' GPT-2, torch's AdamW with its usual betas, clipping at 1: same pairs, order, constant rate."""
    path = write_pairs(tmp_path / "pairs.jsonl", soft=True)
    assert bench.main(flags(path, "--init_from", folder, "--logp", form)) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    policy = transformers.GPT2LMHeadModel.from_pretrained(folder)
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder)

    def logp(gpt2, prompt, response):
        prompt, response = BYTES.encode_ordinary(prompt), BYTES.encode_ordinary(response) + [0]
        logits = gpt2(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        each = -torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none")
        return each.sum() if form == "sum" else each.mean()

    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    pairs = [json.loads(line) for line in open(path)]
    for step, loss in enumerate(losses):
        total = 0.0
        for pair in pairs[4 * step:4 * step + 4]:
            with torch.no_grad():
                ref = [logp(reference, pair["prompt"], pair[key]) for key in ("chosen", "rejected")]
            chosen, rejected = (logp(policy, pair["prompt"], pair[key]) for key in ("chosen", "rejected"))
            total += (chosen - ref[0] - rejected + ref[1] - (pair["p"] - 0.5) / 0.1) ** 2 / 4
        assert loss == pytest.approx(total.item(), rel=1e-4)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def test_operations_are_what_torch_counts():
    """torch counts the matrix products of plain rows; prompt once: chosen + rejected - prompt. Attention: each of
    T tokens meets T / 2 others on average, twice C products, and three times that with the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode
    policy = model.GPT(model.GPTConfig(16, 40, 0, 3, 2, 8))
    rows = [([1, 2, 3, 4], [5, 6, 7, 8, 9]), ([1, 2, 3, 4], [9, 9])]
    pairs = data.PairData(rows, torch.tensor([0]), torch.tensor([1]), torch.ones(1), torch.zeros(1))

    def linear(length, scored):
        x = torch.ones(1, length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            hidden = policy.hidden(x)
            (policy.head(hidden[:, :scored]) if scored else hidden).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(n for name, n in counts.items() if "mm" in str(name))

    matrices = linear(9, 5) + linear(6, 2) - linear(4, 0)
    attention = 6 * 3 * 8 * (9 ** 2 + 6 ** 2 - 4 ** 2)
    assert bench.flops(policy, pairs, torch.tensor([0])) == matrices + attention


def test_a_line_of_json_and_no_files(folder, tmp_path, monkeypatch, capsys):
    """All numbers stand in one line, hang together, and the folder is as it was."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    assert bench.main(flags(path, "--init_from", folder)) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert len(numbers["losses"]) == 5 and numbers["losses"][0] == pytest.approx(25.0, rel=1e-4)
    assert 0 < numbers["floor_s"] < numbers["step_s"] and numbers["times_floor"] > 1
    lengths = sum(2 * (len("say 0:") + 1) + 4 * (1 + i % 3) + 3 * (1 + i % 4) for i in range(20)) / 5
    assert numbers["tokens_per_s"] * numbers["step_s"] == pytest.approx(lengths)
    assert 0.05 < numbers["peak_gib"] < 100 and numbers["matmul_gflops"] > 0.1
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_without_weights_the_model_is_random(tmp_path, capsys):
    """No --init_from: the flags' sizes, h = 0 at first."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    assert bench.main(flags(path, "--n_layer", "1", "--n_embd", "16", "--block_size", "32")) == 0
    assert json.loads(capsys.readouterr().out)["losses"][0] == pytest.approx(25.0, rel=1e-4)


def test_medians_leave_out_the_first_two_steps():
    """Steps of 9, 8, 1, 2, 4 seconds: the median of the last three is 2; processor seconds are half of them."""
    marks = [(wall, wall / 2) for wall in (0, 9, 17, 18, 20, 24)]
    assert bench.medians(marks) == {"step_s": 2, "user_s": 1}
    assert bench.medians(marks[:2]) == {"step_s": 9, "user_s": 4.5}


@pytest.mark.parametrize("change, word", [
    (["--steps", "6"], "lower"), (["--data", "bt"], "JSONL"), (["--against", "trl"], "--logp mean"),
    (["--data", "absent.jsonl"], "absent"), (["--threads", "x"], "threads")])
def test_bad_input_is_a_line(change, word, folder, tmp_path, capsys):
    """Exit status 2, one line that names what is wrong."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    assert bench.main(flags(path, "--init_from", folder, *change)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bench.py:") and word in line


# -------------------------------------------------------------------------------------------------------- TRL

@pytest.mark.parametrize("best", [False, True])
def test_trl_computes_the_same_losses(best, folder, tmp_path):
    """Two independent programs, one sequence of losses: so the times are of the same work."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from lab.models import peer
    path = write_pairs(tmp_path / "pairs.jsonl")
    args = bench.parse(flags(path, "--init_from", folder, "--logp", "mean", "--against", "trl"))
    peer.Noted.losses.clear()
    numbers = peer.theirs(args, best, str(tmp_path))
    assert numbers["losses"] == pytest.approx(bench.ours(args)["losses"], rel=1e-4)
    assert numbers["step_s"] > 0 and numbers["user_s"] > 0


def test_turns_and_ratios(folder, tmp_path, monkeypatch, capsys):
    """Ours, TRL, TRL at its best, and again; ratios are of runs in the same turn (medians of 2, 4 and of 1, 1)."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from lab.models import peer
    seconds, calls = iter([1, 2, 1, 2, 8, 2]), []

    def run(command, env, **more):
        calls.append(command[2:4] + ["--best" in command])
        s = next(seconds)
        line = {"step_s": s, "user_s": s, "peak_gib": 3.0, "losses": [25.0, 24.0 + s / 1000]}
        assert env["OMP_NUM_THREADS"] == "1"
        return SimpleNamespace(returncode=0, stdout="noise\n" + json.dumps(line))

    monkeypatch.setattr(subprocess, "run", run)
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = flags(path, "--init_from", folder, "--logp", "mean", "--against", "trl", "--rounds", "2")
    assert bench.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert calls == 2 * [["lab.models.bench", "--data", False], ["lab.models.peer", "--data", False],
                         ["lab.models.peer", "--data", True]]
    assert report["trl"]["step_s_over_ours"] == 3 and report["trl_best"]["step_s_over_ours"] == 1
    assert report["trl"]["step_s"] == 5 and report["ours"]["peak_gib"] == 3
    assert report["trl"]["loss_difference"] == pytest.approx(0.006, abs=1e-5)


def test_trl_knows_no_p(folder, tmp_path, capsys):
    """Pairs with p would be two different losses: refused."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from lab.models import peer
    path = write_pairs(tmp_path / "pairs.jsonl", soft=True)
    assert peer.main(flags(path, "--init_from", folder, "--logp", "mean")) == 2
    assert "knows no p" in capsys.readouterr().err
