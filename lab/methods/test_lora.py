"""Claims of lab/methods/lora.py: where adapters start, what they may move, what they can reach.
"""
import copy
import json

import pytest
import torch

import data
import ipo
import model
from lab.common import exact
from lab.methods import lora

pytest.importorskip("peft")
FAST = ["--steps", "150", "--sft_steps", "60", "--pairs", "4000", "--batch_size", "128", "--labels", "soft"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """13 responses."""
    monkeypatch.setitem(data.WORLDS, "bt", (["superb", "dull", "hot"], 2))


def some_policy(seed=0):
    torch.manual_seed(seed)
    policy = model.GPT(model.GPTConfig(*data.World("bt").sizes, 2, 4, 32))
    for weight in policy.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return policy


def test_adapters_start_at_the_reference_and_add_a_product_of_low_rank():
    """Same log-probs to the bit at the start; later those of a plain GPT whose matrices are W + B A, rank 2."""
    start, table = some_policy(), exact.Table(data.World("bt"))
    policy = lora.adapted(copy.deepcopy(start), rank=2, words=False)
    assert torch.equal(table(policy), table(start))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight) / 10
    merged = copy.deepcopy(start)
    adapters, count = dict(policy.named_parameters()), 0
    for name, weight in merged.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in adapters:
            added = adapters[f"{stem}.lora_B.default.weight"] @ adapters[f"{stem}.lora_A.default.weight"]
            assert torch.linalg.matrix_rank(added.detach()) == 2
            weight.data += added
            count += 1
    assert count == 8, "four matrices in each of two blocks"
    assert (table(start) - table(merged)).abs().max() > 0.01
    assert torch.allclose(table(policy), table(merged), atol=1e-5)


@pytest.mark.parametrize("words", [False, True])
def test_only_adapters_and_if_asked_the_word_vectors_move(words):
    """Every other number is the same to the bit after steps; rank 3 (in + out) a matrix are trained."""
    policy = lora.adapted(some_policy(), rank=3, words=words)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == ({"transformer.wte.weight"} if words else set())
    wte, C = policy.transformer.wte.weight, 32
    size = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert size == 2 * 3 * (C + 3 * C + C + C + 2 * (C + 4 * C)) + words * wte.numel()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    optimizer, table = ipo.adamw(policy), exact.Table(data.World("bt"))
    for step in (1, 2, 3):
        table(policy)[:, 1].sum().backward()
        ipo.descend(policy, optimizer, step, 3, 1e-2)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


def test_no_hidden_state_reaches_beyond_reach_and_one_attains_it():
    """1,000 random states stay below; the state that points along the steepest pair of words gets there."""
    policy = some_policy()
    policy.transformer.wte.weight.data[3] *= 50  # end-of-text is no word, however long its vector
    ln, words = policy.transformer.ln_f, policy.transformer.wte.weight[:3]
    bound = lora.reach(policy)
    logits = policy.head(ln(3 * torch.randn(1000, 32)))[:, :3]
    assert (logits.amax(-1) - logits.amin(-1)).max() < bound
    steepest = [1e3 * (a - b) * ln.weight for a in words for b in words]
    logits = policy.head(ln(torch.stack(steepest)))[:, :3]
    assert torch.isclose((logits.amax(-1) - logits.amin(-1)).max(), bound, rtol=1e-3)


def test_what_the_optimum_needs_is_the_largest_step_between_last_words():
    """By name: responses of two words that differ in the second."""
    world = data.World("bt")
    logp = torch.randn(world.reward.shape).log_softmax(-1)
    found = 0.0
    for i, one in enumerate(world.responses):
        for j, other in enumerate(world.responses):
            a, b = one.split(), other.split()
            if len(a) == len(b) == 2 and a[0] == b[0]:
                found = max(found, (logp[:, i] - logp[:, j]).max().item())
    assert lora.needed(logp, 3, 2).item() == pytest.approx(found)


def test_the_word_vectors_make_the_difference(tmp_path):
    """In a world that asks for more than adapters reach: all variants start at one reference, wte comes near pi*."""
    assert lora.main(["--out", str(tmp_path), "--tau", "0.1", "--lora_lr", "2e-2", *FAST]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["variants"]
    assert list(found) == ["full", "wte", "lora", "best"] and report["kl"] == found["wte"]["kl"]
    assert report["reach_ref"] < report["needed"] < found["wte"]["reach"]
    assert found["lora"]["reach"] == found["best"]["reach"] == report["reach_ref"], "adapters stand below ln_f"
    assert found["wte"]["kl"] < 0.05 < found["lora"]["kl"] / 3
    assert found["best"]["kl"] < found["lora"]["kl"] + 1e-3, "best descends on this KL itself"
    assert found["full"]["trained"] > 4 * found["lora"]["trained"]


@pytest.mark.parametrize("flags", [["--rank", "0"], ["--variants", "half"], ["--data", "x.jsonl"], ["--lora_lr", "2"]])
def test_bad_input_ends_in_one_line(tmp_path, capsys, flags):
    assert lora.main(["--out", f"{tmp_path}/out", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("lora: ")
