"""Claims of lab/trl_ipo.py; the oracle is the core's own loop (lab/bench.py), which shares no code with TRL.
"""
import argparse

import pytest
import torch
import transformers

import data
import ipo
import model
from lab import bench
from test_bench import flags, folder, write_pairs  # noqa: F401: folder is a fixture

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
from lab import trl_ipo  # noqa: E402: needs both


@pytest.fixture(autouse=True)
def paper(monkeypatch):
    """The paper's Psi, whatever a student made of it."""
    monkeypatch.setattr(ipo, "psi", lambda q: q)


def config(out, **more):
    """In file order at a constant rate, in float32, as lab/bench.py trains."""
    return trl.DPOConfig(**{
        "output_dir": str(out), "per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-3,
        "beta": 0.1, "bf16": False, "use_cpu": True, "lr_scheduler_type": "constant", "logging_steps": 1,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "gradient_checkpointing": False, **more})


def trainer(folder, path, out, loss="ipo", peft_config=None, **more):
    pairs = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{out}/cache")
    return trl_ipo.IPOTrainer(folder, config(out, **more), pairs, loss, peft_config=peft_config)


def losses(done):
    return [line["loss"] for line in done.state.log_history if "loss" in line]


def core(folder, path, loss="ipo"):
    """The core's losses of the same steps, its policy after them and the pairs."""
    args = bench.parse(flags(path, "--init_from", folder, "--loss", loss))
    policy, pairs = bench.prepare(args)
    ref_logp = ipo.score(policy, pairs, torch.arange(len(pairs.prompt_len)), args)
    return list(bench.train(policy, pairs, ref_logp, args)), policy, pairs


@pytest.mark.parametrize("loss, psi", [("ipo", None), ("ipo", "square"), ("dpo", None)])
def test_losses_and_weights_are_the_cores(loss, psi, folder, tmp_path, monkeypatch):
    """The sum over tokens, soft p, any Psi and any loss: equal step by step, and so are the last weights."""
    if psi:
        monkeypatch.setattr(ipo, "psi", lambda q: 0.3 * q ** 2 + q ** 3)
    path = write_pairs(tmp_path / "pairs.jsonl", soft=True)
    ours, policy, _ = core(folder, path, loss)
    done = trainer(folder, path, tmp_path / "out", loss)
    done.train()
    assert losses(done) == pytest.approx(ours, rel=1e-5)
    done.save_model()
    theirs = model.GPT.from_pretrained(str(tmp_path / "out")).state_dict()
    assert all(torch.allclose(x, theirs[name], atol=2e-5) for name, x in policy.state_dict().items())


def test_pairs_without_p_are_certain(folder, tmp_path):
    """No column p: p = 1, and a p that is null, too."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    done = trainer(folder, path, tmp_path / "out", max_steps=2)
    done.train()
    assert losses(done) == pytest.approx(core(folder, path)[0][:2], rel=1e-5)
    collate = done.data_collator
    pair = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    assert collate([pair | {"p": None}, pair | {"p": 0.25}])["p"].tolist() == [1.0, 0.25]


def test_parts_of_a_batch_make_the_batch(folder, tmp_path):
    """Two pairs at a time, twice: the mean over the whole batch, so the same losses and margins."""
    path = write_pairs(tmp_path / "pairs.jsonl", soft=True)
    one, two = trainer(folder, path, tmp_path / "1"), trainer(
        folder, path, tmp_path / "2", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    one.train()
    two.train()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    numbers = [[line["h"] for line in done.state.log_history if "h" in line] for done in (one, two)]
    assert numbers[0][-1] != 0 and numbers[1] == pytest.approx(numbers[0], abs=1e-5)


def test_the_command_leaves_a_model(folder, tmp_path):
    """What it saves gives the log-probs that the core's policy has after the same steps."""
    path = write_pairs(tmp_path / "pairs.jsonl", soft=True)
    argv = ("--bf16 False --use_cpu True --lr_scheduler_type constant --learning_rate 1e-3 --max_steps 5 "
            "--per_device_train_batch_size 4 --train_sampling_strategy sequential --save_strategy no "
            f"--report_to none --disable_tqdm True --data {path} --model_name_or_path {folder}")
    assert trl_ipo.main([*argv.split(), "--output_dir", str(tmp_path / "out")]) == 0
    _, policy, pairs = core(folder, path)
    args = argparse.Namespace(device="cpu", dtype="float32", batch_size=4)
    rows = torch.arange(len(pairs.prompt_len))
    saved = model.GPT.from_pretrained(str(tmp_path / "out"))
    start = model.GPT.from_pretrained(folder)
    expected = ipo.score(policy, pairs, rows, args)
    assert torch.allclose(ipo.score(saved, pairs, rows, args), expected, atol=1e-3)
    assert not torch.allclose(ipo.score(start, pairs, rows, args), expected, atol=0.1)
    transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))


def test_lora_leaves_an_adapter(folder, tmp_path):
    """pi = ref at step 0 though adapters have dropout; the saved adapter on the start is the trained policy."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    path = write_pairs(tmp_path / "pairs.jsonl")
    lora = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True,
                           task_type="CAUSAL_LM")
    done = trainer(folder, path, tmp_path / "out", peft_config=lora, learning_rate=1e-2)
    done.train()
    assert losses(done)[0] == pytest.approx(25.0, rel=1e-5)
    done.save_model()
    start = transformers.GPT2LMHeadModel.from_pretrained(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = start(ids).logits
        after = peft.PeftModel.from_pretrained(start, str(tmp_path / "out")).eval()(ids).logits
        assert torch.allclose(after, done.model.eval()(ids).logits, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


def test_another_reference_stops(folder, tmp_path):
    """A reference that is not the start has margins at step 0."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    done = trainer(folder, path, tmp_path / "out")
    moved = done.train_dataset["ref_chosen_logps"]
    done.train_dataset = done.train_dataset.remove_columns("ref_chosen_logps").add_column(
        "ref_chosen_logps", [x + 1 for x in moved])
    with pytest.raises(ipo.Stopped, match="step 0"):
        done.train()


@pytest.mark.parametrize("change, word", [
    (["--loss_type", "ipo"], "loss_type"), (["--label_smoothing", "0.1"], "label_smoothing"),
    (["--loss", "kto"], "kto"), (["--nonsense", "1"], "nonsense")])
def test_bad_flags_are_a_line(change, word, folder, tmp_path, capsys):
    """What would be accepted and ignored is refused by name; exit status 2, one line."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    argv = ["--data", path, "--model_name_or_path", folder, "--output_dir", str(tmp_path / "out"), "--bf16",
            "False", "--use_cpu", "True", *change]
    assert trl_ipo.main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("trl_ipo.py:") and word in line


def test_p_is_a_probability(folder, tmp_path, capsys):
    """p = 1.5 is refused before anything is trained."""
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, soft=True)
    file.write_text(file.read_text().replace('"p": 1.0', '"p": 1.5'))
    argv = ["--data", str(file), "--model_name_or_path", folder, "--output_dir", str(tmp_path / "out")]
    assert trl_ipo.main([*argv, "--bf16", "False", "--use_cpu", "True"]) == 2
    assert "'p'" in capsys.readouterr().err
