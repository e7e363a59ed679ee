"""Claims of lab/models/trl_ipo.py; the oracle is the core's own steps, which share no code with TRL.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import data
import ipo
from lab.common import start
from lab.models import chat, hf, test_hf
from test_bench import random_gpt2, write_pairs

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from lab.models import trl_ipo

# in file order, at a constant rate, in float32, with ipo.adam's averages
SAME = {"bf16": False, "use_cpu": True, "lr_scheduler_type": "constant", "learning_rate": 1e-3,
        "max_steps": 5, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
        "logging_steps": 1, "adam_beta2": 0.99}
TAU = 0.1


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random GPT-2 that reads bytes, as transformers saves it, with its tokenizer."""
    return random_gpt2(tmp_path_factory.mktemp("gpt2"), "bytes")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No file outside the test's, no look at the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def pairs(tmp_path):
    """A file of 24 pairs with p from 0 to 1."""
    return write_pairs(tmp_path / "pairs.jsonl", soft=True)


def trainer(folder, path, out, loss="ipo", **more):
    """From Python, on pairs as TRL's users load them."""
    loaded = datasets.load_dataset("json", data_files=path, split="train")
    return trl_ipo.IPOTrainer(folder, trl.DPOConfig(str(out), **SAME | more), loaded, loss)


def argv(folder, path, out, *more):
    same = [text for flag, value in SAME.items() for text in (f"--{flag}", str(value))]
    return ["--model", folder, "--data", str(path), "--output_dir", str(out), *same, *more]


def main(flags):
    """The exit status of the command line."""
    return start.main("trl_ipo", trl_ipo.run, flags)


def command(monkeypatch, *flags):
    """The trainer of the command line's run, which has to succeed."""
    made, train = [], trl_ipo.IPOTrainer.train

    def noted(self, **more):
        made.append(self)
        train(self, **more)

    monkeypatch.setattr(trl_ipo.IPOTrainer, "train", noted)
    assert main(argv(*flags)) == 0
    return made[0]


def logged(done, name="loss"):
    return [line[name] for line in done.state.log_history if name in line]


def load(folder):
    """The policy and the pairs of hf, in float32."""
    tokenizer = chat.Tokenizer(folder)
    return hf.load(folder, tokenizer), tokenizer


def encoded(folder, path):
    _, tokenizer = load(folder)
    pairs = data.read_jsonl(str(path), partial(chat.parse_pair, tokenizer=tokenizer))
    return data.encode(pairs, tokenizer, 64)


def core(folder, path, loss="ipo", steps=5):
    """The core's losses of the same steps, and its policy after them."""
    policy, _ = load(folder)
    pairs = encoded(folder, path)
    reference = score(policy, pairs)
    optimizer, losses = ipo.adam(policy), []
    for index in torch.arange(4 * steps).split(4):
        tokens, mask = pairs.padded(pairs.pair_rows(index))
        logp = ipo.sequence_logp(policy, tokens, mask)
        h = ipo.margin(logp, reference.view(2, -1)[:, index].flatten())
        value = ipo.LOSSES[loss](h, pairs.p[index], TAU).mean()
        value.backward()
        ipo.optimizer_step(optimizer, 1, 1, 1e-3)
        losses.append(value.item())
    return losses, policy


def score(policy, pairs):
    """The core's log-probs of all chosen, then of all rejected responses."""
    args = argparse.Namespace(device="cpu", dtype="float32", batch_size=4)
    return ipo.score(policy, pairs, args, pairs.pair_rows(torch.arange(len(pairs.p))))


def second(folder, path):
    """The margin that the log has to show at the second step: the mean over its batch."""
    _, policy = core(folder, path, steps=1)
    pairs = encoded(folder, path)
    chosen, rejected = (score(policy, pairs) - score(load(folder)[0], pairs)).chunk(2)
    h = (chosen - rejected)[4:8].mean().item()
    assert abs(h) > 0.01
    return h


@torch.no_grad()
def trl_score(done):
    """The same by TRL's model, head, tokens and padding."""
    batch = done.data_collator(list(done.train_dataset))
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
    out = done.model.eval()(input_ids=ids, labels=labels, fused_lm_head=True)
    return out.log_probs.sum(1)


@pytest.mark.parametrize("loss, square", [("ipo", True), ("dpo", False)])
def test_losses_and_policy_are_the_cores(loss, square, folder, pairs, tmp_path, monkeypatch):
    """Sums, soft p, any Psi and loss: equal step by step; so are the log-probs after, and in hf.py."""
    if square:
        monkeypatch.setattr(ipo, "psi", lambda q: 0.3 * q ** 2 + q ** 3)
    ours, policy = core(folder, pairs, loss)
    done = command(monkeypatch, folder, pairs, tmp_path / "out", "--loss", loss)
    assert logged(done) == pytest.approx(ours, rel=1e-5)
    rows, after = encoded(folder, pairs), trl_score(done)
    assert torch.allclose(after, score(policy, rows), atol=1e-3)
    assert not torch.allclose(after, score(load(folder)[0], rows), atol=0.1)
    exported, _ = load(str(tmp_path / "out"))
    assert torch.allclose(score(exported, rows), after, atol=1e-4)


def test_pairs_without_p_are_certain(folder, tmp_path):
    """No column p: p = 1, and a p that is null, too."""
    path = write_pairs(tmp_path / "pairs.jsonl")
    done = trainer(folder, path, tmp_path / "out", max_steps=2)
    done.train()
    assert logged(done) == pytest.approx(core(folder, path)[0][:2], rel=1e-5)
    pair = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    batch = done.data_collator([pair | {"p": None}, pair | {"p": 0.25}])
    assert batch["p"].tolist() == [1.0, 0.25]


def test_parts_of_a_batch_make_the_batch(folder, pairs, tmp_path):
    """Two pairs at a time, twice: the core's loss of all four, and its margin."""
    done = trainer(folder, pairs, tmp_path / "out", max_steps=2, per_device_train_batch_size=2,
                   gradient_accumulation_steps=2)
    done.train()
    assert logged(done) == pytest.approx(core(folder, pairs)[0][:2], rel=1e-5)
    assert logged(done, "h") == pytest.approx([0, second(folder, pairs)], abs=1e-3)


def one_of_two(rank, port, flags):
    """The command line as torchrun starts it; in a fork, which need not import TRL again."""
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)  # others do not survive a fork
    datasets.fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None  # a process has its own
    for state in (accelerate.PartialState, accelerate.state.AcceleratorState):
        state._reset_state()
    sys.exit(main(flags))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_two_processes_make_the_batch(folder, pairs, tmp_path):
    """Two pairs in each: the losses and the policy that one process with four has, the core's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = argv(folder, pairs, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "5",
                 "--per_device_train_batch_size", "2")
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=one_of_two, args=(rank, port, words)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        process.kill()
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    ours, policy = core(folder, pairs)
    state = json.loads((tmp_path / "out/checkpoint-5/trainer_state.json").read_text())
    lines = state["log_history"]
    assert [line["loss"] for line in lines] == pytest.approx(ours, rel=1e-5)
    assert lines[1]["h"] == pytest.approx(second(folder, pairs), abs=1e-3)
    saved, _ = load(str(tmp_path / "out"))
    rows = encoded(folder, pairs)
    assert torch.allclose(score(saved, rows), score(policy, rows), atol=1e-3)


def test_lora_leaves_an_adapter(folder, pairs, tmp_path, monkeypatch):
    """pi = ref at step 0 though adapters have dropout; peft loads it: the trained policy's log-probs."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours, _ = core(folder, pairs)
    rows = encoded(folder, pairs)
    done = command(monkeypatch, folder, pairs, tmp_path / "out", "--use_peft", "--lora_r", "4",
                   "--lora_dropout", "0.5", "--learning_rate", "1e-2")
    assert logged(done)[0] == pytest.approx(ours[0], rel=1e-5)
    start = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = score(hf.Policy(start), rows)
    adapted = peft.PeftModel.from_pretrained(start, str(tmp_path / "out")).merge_and_unload()
    after = score(hf.Policy(adapted), rows)
    assert torch.allclose(after, trl_score(done), atol=1e-3)
    assert not torch.allclose(after, before, atol=0.1)


@pytest.mark.parametrize("half", [{}, {"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}],
                         ids=["float32", "bf16", "bfloat16 weights"])
def test_another_reference_stops(half, folder, pairs, tmp_path):
    """A reference that is not the start has margins at step 0; .1 nats are rounding in bfloat16 alone."""
    done = trainer(folder, pairs, tmp_path / "out", max_steps=1, **half)
    done.train_dataset = done.train_dataset.map(
        lambda pair: {"ref_chosen_logps": pair["ref_chosen_logps"] + 0.1})
    if half:
        done.train()
    else:
        with pytest.raises(ipo.Stopped, match="before the first step"):
            done.train()


def test_weights_are_of_the_dtype_that_was_asked_for(folder, pairs, tmp_path, monkeypatch):
    """--dtype reaches the model, as its saved configuration shows."""
    command(monkeypatch, folder, pairs, tmp_path / "out", "--max_steps", "1", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_nothing_is_cut(folder, pairs, tmp_path):
    """A max_length of 8 tokens, which would cut each response, changes no loss."""
    done = trainer(folder, pairs, tmp_path / "out", max_length=8, max_steps=2)
    done.train()
    assert logged(done) == pytest.approx(core(folder, pairs)[0][:2], rel=1e-5)


def test_equal_responses_are_dropped_and_counted(folder, pairs, tmp_path, monkeypatch, capsys):
    """As the core drops them: the same losses with such a pair in front."""
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"prompt": "say", "chosen": " a", "rejected": " a"}\n' + Path(pairs).read_text())
    done = command(monkeypatch, folder, twice, tmp_path / "out", "--max_steps", "2")
    assert logged(done) == pytest.approx(core(folder, pairs)[0][:2], rel=1e-5)
    assert "1 of 25 pairs left out, of two equal responses" in capsys.readouterr().out


def test_odd_pairs_are_counted_as_in_the_core(folder, pairs, tmp_path, monkeypatch, capsys):
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"prompt": "say", "chosen": "say a", "rejected": ""}\n' + Path(pairs).read_text())
    command(monkeypatch, folder, odd, tmp_path / "out", "--max_steps", "1")
    said = capsys.readouterr().out
    assert "1 pairs with an empty or blank response" in said
    assert "1 pairs with a response that repeats its prompt" in said


def test_the_advice_on_dropout_can_be_followed(pairs, tmp_path, capsys):
    """Llama's in its attention, which TRL does not switch off."""
    test_hf.random_model(tmp_path / "in")
    test_hf.byte_tokenizer(tmp_path / "in")
    flags = argv(str(tmp_path / "in"), pairs, tmp_path / "out", "--max_steps", "1")
    assert main(flags) == 1
    assert "set every dropout in the model's config.json to 0" in capsys.readouterr().err
    config = tmp_path / "in/config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.5', '"attention_dropout": 0.0'))
    assert main(flags) == 0


def test_conversations_are_texts_by_the_models_template(folder, tmp_path, monkeypatch):
    """Lists of messages give the tokens that the same pair gives as texts, written as the template does."""
    template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}"
                "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}assistant: {% endif %}")
    speaks = str(tmp_path / "speaks")
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(speaks)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(speaks)
    user, yes, no = ({"role": role, "content": text} for role, text in
                     [("user", "Hi"), ("assistant", "Yes."), ("assistant", "No")])
    file = tmp_path / "talk.jsonl"
    lines = [{"chosen": [user, yes], "rejected": [user, no]},
             {"prompt": "user: Hi\nassistant: ", "chosen": "Yes.", "rejected": "No"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    done = command(monkeypatch, speaks, file, tmp_path / "out", "--max_steps", "1")
    first, second = done.train_dataset
    assert all(first[key] == second[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert tokenizer.convert_ids_to_tokens(first["chosen_ids"]) == [*"Yes.", data.EOT]


def test_a_run_goes_on_where_it_was_saved(folder, pairs, tmp_path, monkeypatch):
    """TRL's --resume_from_checkpoint: 2 steps, then 3 more, have the losses of 5."""
    out = tmp_path / "out"
    command(monkeypatch, folder, pairs, out, "--max_steps", "2", "--save_strategy", "steps", "--save_steps",
            "2")
    done = command(monkeypatch, folder, pairs, out, "--resume_from_checkpoint", f"{out}/checkpoint-2")
    assert logged(done) == pytest.approx(core(folder, pairs)[0], rel=1e-5)


def test_pairs_beyond_the_context_are_left_out_and_counted(folder, pairs, tmp_path, monkeypatch, capsys):
    """TRL would end in an error of torch; the losses are those without it."""
    longer = tmp_path / "longer.jsonl"
    line = json.dumps({"prompt": 60 * "a", "chosen": " yes", "rejected": " no"})
    longer.write_text(line + "\n" + Path(pairs).read_text())
    done = command(monkeypatch, folder, longer, tmp_path / "out", "--max_steps", "2")
    assert logged(done) == pytest.approx(core(folder, pairs)[0][:2], rel=1e-5)
    said = capsys.readouterr().out
    assert "1 of 25 pairs left out" in said
    assert "more than the model's 64 tokens" in said


def test_a_machine_without_a_gpu_trains_on_the_cpu_in_float32(folder, pairs, tmp_path, capsys):
    """Nobody has to ask for it; it is told, and so is where the model is."""
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    out = str(tmp_path / "out")
    flags = ["--model", folder, "--data", pairs, "--output_dir", out, "--max_steps", "1", "--tau", "0.5"]
    assert main([*flags, "--report_to", "none", "--per_device_train_batch_size", "4"]) == 0
    said = capsys.readouterr().out
    assert "no GPU here: the CPU trains, in float32" in said
    assert said.splitlines()[-1] == f"Trained by 1 process(es); it is in {out}."
    state = json.loads(Path(out, "config.json").read_text())
    assert state["dtype"] == "float32"


def test_the_cache_is_the_runs_own(folder, pairs, tmp_path, monkeypatch):
    """What an earlier run left there is not used: step 0 is 0 after a run in bfloat16."""
    command(monkeypatch, folder, pairs, tmp_path / "out", "--max_steps", "1", "--bf16", "True")
    done = command(monkeypatch, folder, pairs, tmp_path / "out", "--max_steps", "1")
    assert logged(done) == pytest.approx(core(folder, pairs)[0][:1], rel=1e-5)
    assert list((tmp_path / "out/cache").glob("**/*.arrow"))
    assert not list(tmp_path.glob("cache/**/*.arrow"))


@pytest.mark.parametrize("change, words", [
    (["--loss_type", "sigmoid"], "--loss_type would change the loss"), (["--loss_type=ipo"], "--loss_type"),
    (["--label_smoothing", "0.0"], "--label_smoothing"), (["--max_length", "512"], "--max_length"),
    (["--max-length", "9"], "--max_length"), (["--loss_typ", "ipo"], "loss_typ"),
    (["--tau", "0"], "--tau is '0'; it takes 0.001..1e9"), (["--loss", "kto"], "kto"),
    (["--beta", "1"], "(beta is --tau); leave it out"),
    (["--nonsense", "1", "--more"], ": unrecognized arguments: --nonsense 1 --more (TRL has --max_steps, "),
    (["--nonsense", "1"], "; --help lists the flags"),
    (["--data=--"], "--data=--: -- and bytes"), (["--data", "absent.jsonl"], "absent.jsonl"),
    (["--model", "absent"], "there is no such folder")])
def test_bad_flags_are_a_line(change, words, folder, pairs, tmp_path, capsys):
    """What would be accepted and ignored is refused by name; exit status 2, one line."""
    assert main([*argv(folder, pairs, tmp_path / "out"), *change]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("trl_ipo: ")
    assert words in line


@pytest.mark.parametrize("change, words", [
    (["--gradient_accumulation_steps", "0"], "by zero"),
    (["--resume_from_checkpoint", "nope"], "Can't find a valid checkpoint at nope"),
    (["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
    (["--model_init_kwargs", '{"a": 1}'], "unexpected keyword argument 'a'")])
def test_what_trl_does_not_check_is_a_line(change, words, folder, pairs, tmp_path, capsys):
    """Neither a traceback nor the bar that TRL shows while it scores the reference."""
    assert main([*argv(folder, pairs, tmp_path / "out"), *change]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("trl_ipo: ")
    assert words in line
    assert line.endswith("; change the flag that this is about, --help lists all")


def test_damaged_weights_are_a_line(folder, pairs, tmp_path, capsys):
    """safetensors raises an error of its own kind."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"cut")
    assert main(argv(str(tmp_path / "model"), pairs, tmp_path / "out")) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "header" in line


def test_a_refusal_has_no_warnings_before_it(pairs, tmp_path):
    """In a process of its own, as transformers warns once."""
    command = [sys.executable, "-m", "lab.models.trl_ipo", "--model", "absent", "--data", pairs]
    top = Path(ipo.__file__).parent
    done = subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=top, capture_output=True, text=True)
    line, = done.stderr.splitlines()
    assert line.startswith("trl_ipo: model absent")


def test_a_run_that_diverges_stops(folder, pairs, tmp_path, capsys):
    """Its model is no result."""
    assert main(argv(folder, pairs, tmp_path / "out", "--learning_rate", "1e30")) == 1
    assert "the loss is not finite; lower --learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "a", "chosen": " b", "rejected": " c", "p": 1.5}', ":1: 'p' is 1.5"), ("{", ":1: no JSON"),
    ("", "the file is empty"), ('{"prompt": "a", "chosen": " b", "rejected": " b"}', "no usable pair")])
def test_a_bad_file_is_a_line(line, words, folder, tmp_path, capsys):
    """Before anything is trained, with the line's number."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(line)
    assert main(argv(folder, file, tmp_path / "out")) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
