"""Claims of lab/models/hf.py and lab/models/chat.py; the oracles are transformers' own, made here.
"""
import itertools
import json
import shutil
from collections import Counter
from functools import partial

import pytest
import torch

import data
import ipo
import model
from lab.common import start
from lab.models import chat, hf

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
Auto = transformers.AutoModelForCausalLM

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
FAMILIES = {  # dropout where a family has one: it must be off
    "llama": SMALL | {"attention_dropout": 0.5}, "qwen2": SMALL, "mistral": SMALL,
    "gemma": SMALL | {"head_dim": 8}, "gemma2": SMALL | {"head_dim": 8}, "phi": SMALL | {"resid_pdrop": 0.5},
    "gpt_neox": NEOX | {"hidden_dropout": 0.5},
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.5},
    "gpt2 untied": GPT2 | {"tie_word_embeddings": False}, "gpt2 relu": GPT2 | {"activation_function": "relu"}}

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")
ROLES = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")

USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "Blue"}
FOUR = [  # the same pair
    {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    {"chosen": [USER, YES], "rejected": [USER, NO]},
    {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    {"prompt": [], "chosen": [USER | {"name": "Ann"}, YES], "rejected": [USER, NO]}]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No look at the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def random_model(folder, family="llama", **more):
    """A model of this family with large random weights, saved in the folder."""
    torch.manual_seed(0)
    chat.quiet()
    config = transformers.AutoConfig.for_model(family.split()[0], **FAMILIES[family] | more)
    made = Auto.from_config(config).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    made.save_pretrained(folder)
    return made


def byte_tokenizer(folder, bos=True, template=CHATML, eos="<|im_end|>"):
    """Byte-level BPE with some merges, of line breaks, too, and ChatML's control tokens."""
    merges = [("e", "s"), ("Y", "es"), ("\u010a", "\u010a"), (".", "\u010a"), (":", "\u010a")]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>", "<|end|>"])
    return finished(inner, folder, bos, template, eos)


def space_tokenizer(folder, scheme="always", bos=True, template=INST, eos="</s>"):
    """SentencePiece's way: BPE on text whose spaces are marked, with one more before any text."""
    letters = [*"\u2581\nabcdefghijklmnopqrstuvwxyzABCHINSTUY[]/?.:!1", "Bl", "\u2581Bl", "ue"]
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    merges = [("B", "l"), ("\u2581", "Bl"), ("u", "e")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme, split=False)
    inner.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    return finished(inner, folder, bos, template, eos)


def finished(inner, folder, bos, template, eos):
    single = "<s> $A" if bos else "$A"
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", inner.token_to_id("<s>"))])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos,
                                                unk_token=inner.model.unk_token)
    made.chat_template = template
    made.save_pretrained(folder)
    return chat.Tokenizer(str(folder))


def write(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def texts(path, n=12):
    """A file of n pairs."""
    return write(path, *({"prompt": f"question {i}?", "chosen": "Yes, it is.", "rejected": f"No {i}"}
                         for i in range(n)))


def read(path, tokenizer):
    """The pairs of a file, as hf reads them."""
    return data.read_jsonl(path, partial(chat.parse_pair, tokenizer=tokenizer))


def main(argv):
    """The exit status of the command line."""
    return start.main("hf", hf.run, argv)


def pair_ids(tmp_path, tokenizer, item):
    """Ids of prompt, chosen and rejected response of one line, as the core encodes them."""
    pairs = read(write(tmp_path / "one.jsonl", item), tokenizer)
    encoded = data.encode(pairs, tokenizer, 64)
    chosen, rejected = encoded.tokens.tolist()
    n = int(encoded.prompt_len[0])
    ends = encoded.length.tolist()
    return chosen[:n], chosen[n:ends[0]], rejected[n:ends[1]]


def flags(tmp_path, *more):
    """Those of a short run: the model in tmp_path/in, its files in tmp_path/out."""
    return ["--init_from", str(tmp_path / "in"), "--data", str(tmp_path / "pairs.jsonl"), "--out",
            str(tmp_path / "out"), "--steps", "6", "--batch_size", "4", "--lr", "1e-2", "--log_every", "3",
            "--device", "cpu", *more]


# ----------------------------------------------------------------------------------------------------- models

@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_transformers_own(tmp_path, family):
    """Behind <s>, with padding on the right, and with dropout off."""
    theirs = random_model(tmp_path, family)
    tokenizer = byte_tokenizer(tmp_path)
    policy = hf.load(str(tmp_path), tokenizer)
    tokens = torch.randint(300, (3, 12))
    t = torch.arange(12)
    begin = torch.tensor([[1], [4], [3]])
    end = torch.tensor([[12], [9], [7]])
    mask = (t >= begin) & (t < end)
    with torch.no_grad():
        row = torch.cat([torch.full((3, 1), tokenizer.start[0]), tokens], 1)
        logits = theirs(row).logits[:, 1:]
        logp = logits[:, :-1].log_softmax(-1)
        logp = logp.gather(2, tokens[:, 1:, None])[..., 0]
        expected = (logp * mask[:, 1:]).sum(1)
        found = ipo.sequence_logp(policy, tokens * (t < end), mask)
    assert logits.std() > 0.1
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_goes_out(tmp_path, family):
    """AutoModelForCausalLM loads the export, whose logits are the trained policy's and not those at first."""
    theirs = random_model(tmp_path / "in", family)
    tokenizer = byte_tokenizer(tmp_path / "in")
    texts(tmp_path / "pairs.jsonl")
    assert main(flags(tmp_path)) == 0
    policy = hf.load(str(tmp_path / "in"), tokenizer)
    policy.load_state_dict(model.read(str(tmp_path / "out/ckpt.pt"))["model"])
    back = Auto.from_pretrained(tmp_path / "out/export")
    tokens = torch.randint(300, (3, 12))
    row = torch.cat([torch.full((3, 1), tokenizer.start[0]), tokens], 1)
    with torch.no_grad():
        after = back(row).logits
        trained = policy.head(policy.hidden(tokens))
        before = theirs(row).logits
    assert type(back) is type(theirs)
    assert torch.allclose(trained, after[:, 1:], rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


def test_what_a_run_saves_is_whole(tmp_path):
    """The export's tokenizer is the model's, with its template."""
    random_model(tmp_path / "in")
    tokenizer = byte_tokenizer(tmp_path / "in")
    texts(tmp_path / "pairs.jsonl")
    assert main(flags(tmp_path)) == 0
    again = chat.Tokenizer(str(tmp_path / "out/export"))
    for text in "Yes, yes", "\u00e9 \U0001f642 <|im_end|>":
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert again.decode(again.encode_ordinary(text)) == text
    assert again.hf.chat_template == CHATML
    assert again.start == tokenizer.start


def test_a_run_says_where_the_model_is_and_who_made_it(tmp_path, capsys):
    """Its last line; and its saved flags name the program."""
    random_model(tmp_path / "in")
    byte_tokenizer(tmp_path / "in")
    texts(tmp_path / "pairs.jsonl")
    assert main(flags(tmp_path)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("It is trained") and str(tmp_path / "out/export") in last
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["flags"]["program"] == "lab.models.hf"
    assert report["after"]["loss"] < 20


def test_samples_are_transformers_own(tmp_path):
    """Greedy texts of the core's generate equal transformers' generate behind <s>."""
    theirs = random_model(tmp_path)
    tokenizer = byte_tokenizer(tmp_path)
    policy = hf.load(str(tmp_path), tokenizer)
    prompt = tokenizer.encode_ordinary("Where to?")
    row = torch.tensor([tokenizer.start + prompt])
    ids = theirs.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=20, pad_token_id=0,
        eos_token_id=tokenizer.eot_token, suppress_tokens=list(range(tokenizer.n_vocab, 300)))
    ids = [i for i in ids[0, row.shape[1]:].tolist() if i != tokenizer.eot_token]
    said = model.generate(policy, tokenizer, "Where to?", temperature=0, max_new_tokens=20)
    assert len(ids) > 3
    assert "Where to?" + said == tokenizer.decode(prompt + ids)


def test_no_id_is_sampled_that_the_tokenizer_lacks(tmp_path, monkeypatch):
    """The model has 300 ids and the tokenizer 265: however hot, what is drawn can be decoded."""
    random_model(tmp_path)
    tokenizer = byte_tokenizer(tmp_path)
    policy = hf.load(str(tmp_path), tokenizer)
    decode, seen = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids: seen.extend(ids) or decode(ids))
    for seed in range(2):
        model.generate(policy, tokenizer, "a", temperature=100, seed=seed)
    assert policy.config.vocab_size == 300
    assert 200 < max(seen) < tokenizer.n_vocab


class Ahead(transformers.LlamaModel):
    """A trunk whose tokens see the one behind them."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.roll(-1, dims=1)
        return out


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path, monkeypatch):
    """Its logits are the head of its hidden states, and yet no log-prob of a response."""
    random_model(tmp_path)
    tokenizer = byte_tokenizer(tmp_path)
    hf.load(str(tmp_path), tokenizer)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel", Ahead)
    with pytest.raises(data.Refused, match="tokens see later ones: not causal; name a"):
        hf.load(str(tmp_path), tokenizer)


def test_models_that_cannot_be_trained_are_refused_in_a_line(tmp_path):
    """Not there, encoder-decoder, both ways, logits scaled elsewhere, cut, missing weights: never a guess."""
    from safetensors.torch import load_file, save_file
    random_model(tmp_path / "tokenizer")
    tokenizer = space_tokenizer(tmp_path / "tokenizer")
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32}
    t5 = transformers.T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=32)
    granite = transformers.GraniteConfig(**small, num_key_value_heads=2, logits_scaling=8.0)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    transformers.BertForMaskedLM(transformers.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    transformers.GraniteForCausalLM(granite).save_pretrained(tmp_path / "granite")
    random_model(tmp_path / "cut")
    shutil.copytree(tmp_path / "cut", tmp_path / "part")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    state = load_file(tmp_path / "part/model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "empty").mkdir()
    for name, words in {"nothing": "nothing", "t5": "Unrecognized configuration", "bert": "its ",
                        "empty": "empty", "granite": "not the head of its hidden states", "cut": "cut",
                        "part": "weights are missing: ['model.norm.weight']"}.items():
        with pytest.raises(data.Refused) as error:
            hf.load(str(tmp_path / name), tokenizer)
        said = str(error.value)
        assert said.startswith("model ")
        assert words in said


def test_tokenizers_that_cannot_be_used_are_refused_in_a_line(tmp_path, capsys):
    """None there, damaged, without end of text, with more ids than the model reads."""
    texts(tmp_path / "pairs.jsonl")

    def refused(words):
        assert main(flags(tmp_path)) == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith(f"hf: model {tmp_path / 'in'}: ")
        assert words in line
    random_model(tmp_path / "in", "gpt2 relu", vocab_size=200)
    refused("it holds no tokenizer; put the model's tokenizer files there")
    byte_tokenizer(tmp_path / "in")
    refused("its tokenizer has 265 ids, more than its model")
    settings = json.loads((tmp_path / "in/tokenizer_config.json").read_text())
    (tmp_path / "in/tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    refused("no end of text to train")
    (tmp_path / "in/tokenizer.json").write_text("{")
    refused("put the model's tokenizer files there")


def test_a_hub_id_without_a_network_asks_for_no_files(tmp_path, capsys):
    """Nothing is to be put into a folder that is not there."""
    texts(tmp_path / "pairs.jsonl")
    assert main(flags(tmp_path, "--init_from", "nobody/nothing")) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "there is no such folder, and an id of the hub needs a network once" in line


# ------------------------------------------------------------------------------------------------------ texts

def test_what_a_model_expects_before_any_text_is_never_cut(tmp_path):
    """A long prompt is cut to what the context leaves behind <s>, and rows are scored behind <s>: the
    model's own log-probs of [<s>, tail of the prompt, response]."""
    theirs = random_model(tmp_path)
    tokenizer = byte_tokenizer(tmp_path)
    policy = hf.load(str(tmp_path), tokenizer)
    pairs = [data.Pair("0123456789" * 10, "abc", "d")]
    encoded = data.encode(pairs, tokenizer, policy.config.block_size)
    tokens, mask = encoded.padded(torch.arange(2))
    row = torch.cat([torch.tensor([tokenizer.start]), tokens[:1]], 1)
    logp = theirs(row).logits.log_softmax(-1)[0, :-1]
    logp = logp.gather(1, row[0, 1:, None])[:, 0]
    assert row.shape[1] == 64
    assert tokenizer.start[0] not in tokens
    assert torch.allclose(ipo.sequence_logp(policy, tokens, mask)[0], logp[-4:].sum(), atol=1e-4)


def test_start_is_what_stands_before_a_text_not_behind_it(tmp_path):
    """<s> before is start; an end of text that a tokenizer writes behind is not."""
    tokenizer = space_tokenizer(tmp_path)
    inner = tokenizer.hf.backend_tokenizer
    for single, start in {"<s> $A </s>": [1], "$A </s>": [], "$A": [], "</s> <s> $A": [2, 1]}.items():
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
        made.save_pretrained(tmp_path)
        assert chat.Tokenizer(str(tmp_path)).start == start, single


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_no_space_appears_before_a_response(tmp_path, scheme):
    """The tokenizer's own mark of a space, here _, stands before a text, also before a response that begins
    one, and nowhere between prompt and response. Nor may a border vanish in one token: ue, _Bl, unknown."""
    tokenizer = space_tokenizer(tmp_path, scheme)

    def tokens(prompt, chosen):
        item = {"prompt": prompt, "chosen": chosen, "rejected": "a"}
        parts = pair_ids(tmp_path, tokenizer, item)[:2]
        found = [" ".join(tokenizer.hf.convert_ids_to_tokens(ids)) for ids in parts]
        return " | ".join(found).replace("\u2581", "_")
    assert tokens("Blue?\n", "Blue") == "_Bl ue ? \n | Bl ue </s>"
    assert tokens("Blue?", "Blue Blue") == "_Bl ue ? | Bl ue _Bl ue </s>"
    assert tokens("u", "e Blue") == "_ u | e _Bl ue </s>"
    assert tokens("a ", "Blue") == "_ a _ | Bl ue </s>"
    assert tokens("a", " Blue") == "_ a | _Bl ue </s>"
    assert tokens("a\u2603", "\u2603b") == "_ a <unk> | <unk> b </s>"
    assert tokens("", "Blue") == "</s> | _Bl ue </s>"


def test_bytes_are_never_joined_over_the_border(tmp_path):
    """A line break that this tokenizer joins with what precedes it stands alone at a response's start."""
    tokenizer = byte_tokenizer(tmp_path / "in")
    assert [len(tokenizer.ids(text)) for text in ("\n\n", ".\n", ":\n", "a\n")] == [1, 1, 1, 2]
    item = {"prompt": "Where?\n", "chosen": "\nYes", "rejected": "Yes"}
    found = pair_ids(tmp_path, tokenizer, item)
    prompt, chosen, rejected = (tokenizer.hf.convert_ids_to_tokens(ids) for ids in found)
    assert prompt[-1] == "\u010a"
    assert chosen == ["\u010a", "Yes", "<|im_end|>"]
    assert rejected == chosen[1:]


def test_a_word_level_tokenizer_works(tmp_path):
    """Whole words, <unk> for others; the same ids before and behind a border."""
    ids = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "yes", "no", "why"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    tokenizer = finished(inner, tmp_path, True, None, "</s>")
    assert tokenizer.start == [1] and tokenizer.n_vocab == 6
    item = {"prompt": "why not", "chosen": "yes", "rejected": "no no"}
    assert pair_ids(tmp_path, tokenizer, item) == ([5, 0], [3, 2], [4, 4, 2])


def test_a_written_out_control_token_is_text(tmp_path):
    """Nothing in a plain text becomes a control token, also where a response is encoded behind its prompt."""
    for tokenizer in byte_tokenizer(tmp_path / "b"), space_tokenizer(tmp_path / "s"):
        token = tokenizer.hf.eos_token
        item = {"prompt": f"a {token}", "chosen": f"b {token} c", "rejected": f"{token}"}
        prompt, chosen, rejected = pair_ids(tmp_path, tokenizer, item)
        assert tokenizer.eot_token not in prompt + chosen[:-1] + rejected[:-1]
        assert chosen[-1] == rejected[-1] == tokenizer.eot_token


# ---------------------------------------------------------------------------------------------- conversations

def tokenizer_of(kind, folder):
    """A tokenizer with a chat template; the ones of SentencePiece's way write <s> themselves."""
    if kind == "bytes":
        return byte_tokenizer(folder, bos=False)
    scheme, template = kind.split()
    return space_tokenizer(folder, scheme, template={"inst": INST, "roles": ROLES}[template])


KINDS = ["bytes", "always inst", "first inst", "always roles", "first roles"]


@pytest.mark.parametrize("kind, item", list(itertools.product(KINDS, FOUR)))
def test_conversations_have_the_tokens_of_the_chat_template(tmp_path, kind, item, capsys):
    """start + prompt + response are the ids of apply_chat_template for the whole conversation up to its
    end of text, in each of the four ways; the prompt is what it gives with add_generation_prompt."""
    tokenizer = tokenizer_of(kind, tmp_path / "in")

    def oracle(messages, **more):
        return tokenizer.hf.apply_chat_template(messages, tokenize=True, **more)["input_ids"]
    prompt, *responses = pair_ids(tmp_path, tokenizer, item)
    assert tokenizer.start + prompt == oracle([USER], add_generation_prompt=True)
    for answer, response in zip((YES, NO), responses):
        whole = oracle([USER, answer])
        length = len(whole) - whole[::-1].index(tokenizer.eot_token)
        assert tokenizer.start + prompt + response == whole[:length]
        assert response.count(tokenizer.eot_token) == 1
        assert answer["content"] in tokenizer.decode(response)
    said = capsys.readouterr().out
    assert "writes no" not in said


def test_a_template_that_ends_otherwise_keeps_its_end(tmp_path):
    """Where the tokenizer's end of text is not the template's end of turn, both are trained."""
    tokenizer = byte_tokenizer(tmp_path / "in", eos="<|end|>")
    _, chosen, _ = pair_ids(tmp_path, tokenizer, FOUR[0])
    assert tokenizer.decode(chosen) == "Yes.<|im_end|>\n<|end|>"


def test_a_template_without_the_start_follows_it(tmp_path):
    """<s> stands before every row, also where the template writes none; it is no part of the prompt."""
    tokenizer = byte_tokenizer(tmp_path / "in", bos=True)
    prompt, *_ = pair_ids(tmp_path, tokenizer, FOUR[0])
    assert tokenizer.decode(prompt).startswith("<|im_start|>user")


def test_texts_and_conversations_share_a_file(tmp_path, capsys):
    """Lines of both kinds, with p, blank lines and unused keys; texts as the core reads them."""
    lines = [FOUR[0] | {"p": 0.75}, {"prompt": "a", "chosen": "b", "rejected": "c", "id": 1}]
    path = write(tmp_path / "pairs.jsonl", *lines)
    with open(path, "a") as file:
        file.write("\n\n")
    pairs = read(path, byte_tokenizer(tmp_path / "in"))
    assert [pair.p for pair in pairs] == [0.75, 1.0]
    assert pairs[1][:3] == ("a", "b", "c")
    said = capsys.readouterr().out
    assert "2 blank lines skipped" in said
    assert "1 lines with keys that are not used: 'id'" in said


def test_what_else_a_message_holds_is_counted(tmp_path, capsys):
    """A tool's call would be lost in silence."""
    call = YES | {"content": "", "tool_calls": [{"function": {"name": "f"}}]}
    path = write(tmp_path / "pairs.jsonl", FOUR[0] | {"chosen": [call]})
    read(path, byte_tokenizer(tmp_path / "in"))
    assert f"{path}: 1 messages with more than role and content, unused" in capsys.readouterr().out


WRITE = 'write [{"role": "user", "content": "..."}]'
REFUSED = [
    (None, FOUR[0], "the model's chat template refuses these messages (Cannot use chat template"),
    (CHATML, {"prompt": [USER], "chosen": [YES | {"content": "a<|im_end|>"}], "rejected": [YES]},
     "a message holds '<|im_end|>', which would be a control token; remove it"),
    (CHATML, {"prompt": [{"role": "user<s>", "content": "a"}], "chosen": [YES], "rejected": [NO]},
     "a message holds '<s>'"),
    ("{{ raise_exception('no system here') }}", FOUR[0],
     "the model's chat template refuses these messages (no system here); mend their roles or order"),
    ("{{ messages|length }}" + CHATML, FOUR[0], "the model's chat template writes the prompt otherwise"),
    (CHATML, {"chosen": [USER, YES], "rejected": "No"},
     "'rejected' is \"No\", not messages; " + WRITE),
    (CHATML, {"prompt": [USER], "chosen": "Yes", "rejected": "No"}, "'chosen' is \"Yes\", not messages"),
    (CHATML, {"prompt": [USER], "chosen": [YES]}, "'rejected' is \"no such key\", not messages"),
    (CHATML, {"chosen": [USER, YES], "rejected": [USER | {"content": "Ho"}, YES]},
     "chosen and rejected need messages, the same in both, before their last ones"),
    (CHATML, {"chosen": [YES], "rejected": [NO]}, "chosen and rejected need messages"),
    (CHATML, {"chosen": [USER, YES], "rejected": [USER]}, "'rejected' does not end in a message of role"),
    (CHATML, {"prompt": [USER], "chosen": [], "rejected": []}, "'chosen' does not end in a message of role"),
    (CHATML, {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]},
     "'prompt' is \"Hi\", not messages; " + WRITE + "; of ShareGPT's messages, of a single one or a "
     "text python -m lab.models.jsonl makes"),
    (CHATML, {"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]}, "'prompt' is null, not"),
    (CHATML, {"prompt": 5, "chosen": [USER, YES], "rejected": [USER, NO]}, "'prompt' is 5, not messages"),
    (CHATML, {"prompt": "a", "chosen": None, "rejected": "b"}, "'chosen' is null, not messages"),
    (CHATML, {"prompt": "a", "chosen": "b", "rejected": 5}, "'rejected' is 5, not messages"),
    (CHATML, {"chosen": [USER, YES], "rejected": ["No"]}, "'rejected' is [\"No\"], not messages"),
    (CHATML, {"chosen": [USER, YES], "rejected": [USER | {"content": ["No"]}]}, "'rejected' is [{"),
    (CHATML, {"chosen": [USER, YES], "rejected": [{"content": "No"}]}, "'rejected' is [{"),
    (CHATML, {"prompt": [USER], "chosen": YES, "rejected": NO}, "'chosen' is {"),
    (CHATML, {"prompt": [{"from": "human", "value": "Hi"}], "chosen": [YES], "rejected": [NO]},
     "'prompt' is [{"),
    (CHATML, {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": [USER, YES],
              "rejected": [USER, NO]},
     '\'prompt\' begins with {"role": "system", "content": "Be brief."}, \'chosen\' with {"role": "us'),
    (CHATML, FOUR[0] | {"p": 2}, "'p' is 2"),
    (CHATML, {"prompt": [USER | {"content": "\ud83d"}], "chosen": [YES], "rejected": [NO]}, "no JSON in UTF")]


@pytest.mark.parametrize("template, item, message", REFUSED)
def test_lines_that_cannot_be_used_are_named(tmp_path, template, item, message):
    """File, line, what and the remedy, in one line."""
    tokenizer = byte_tokenizer(tmp_path / "in", template=template)
    path = write(tmp_path / "pairs.jsonl", item)
    with pytest.raises(data.Refused) as error:
        read(path, tokenizer)
    said = str(error.value)
    assert said.startswith(f"{path}:1: ")
    assert message in said
    assert "\n" not in said


def test_the_advice_of_the_core_can_be_followed(tmp_path):
    """It sends lists of messages here."""
    path = write(tmp_path / "pairs.jsonl", FOUR[0])
    with pytest.raises(data.Refused, match="lists of messages .* python -m lab.models.hf"):
        data.read_jsonl(path)
    assert len(read(path, byte_tokenizer(tmp_path / "in"))) == 1


def test_a_prompt_is_put_before_an_answer_alone():
    """Where chosen begins with the answer, the prompt's messages come first; where it repeats them, once."""
    system = {"role": "system", "content": "Be brief."}
    for more in [], [system, USER]:
        item = {"prompt": [system, USER], "chosen": [*more, YES], "rejected": [*more, NO]}
        assert chat.conversation(item, Counter()) == ([system, USER], "Yes.", "Blue")


# ------------------------------------------------------------------------------------------------ the program

def test_a_chat_model_is_trained_on_conversations(tmp_path):
    """The loss saw margins of transformers' own log-probs of whole conversations, trained less reference."""
    theirs = random_model(tmp_path / "in")
    tokenizer = byte_tokenizer(tmp_path / "in", bos=False)
    items = [FOUR[0] | {"prompt": [USER | {"content": letter}]} for letter in "abcd"]
    write(tmp_path / "pairs.jsonl", *items)
    assert main(flags(tmp_path, "--holdout", "0")) == 0
    back = Auto.from_pretrained(tmp_path / "out/export")

    @torch.no_grad()
    def logp(hugging_face, item, answer):
        apply = tokenizer.hf.apply_chat_template
        n = len(apply(item["prompt"], add_generation_prompt=True)["input_ids"])
        row = torch.tensor([apply([*item["prompt"], answer])["input_ids"][:-1]])  # a line break ends it
        logp = hugging_face(row).logits.log_softmax(-1)[0, n - 1:-1]
        return logp.gather(1, row[0, n:, None]).sum().item()

    def gain(answer):
        gains = [logp(back, item, answer) - logp(theirs, item, answer) for item in items]
        return sum(gains) / len(gains)
    after = json.loads((tmp_path / "out/report.json").read_text())["after"]
    assert after["chosen"] == pytest.approx(gain(YES), abs=1e-3)
    assert after["h"] == pytest.approx(gain(YES) - gain(NO), abs=1e-3)
    assert after["h"] > 1


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    """Stopped after half its steps and resumed twice: weights, log and export as in one go, behind <s>."""
    random_model(tmp_path / "in", "gemma2")
    byte_tokenizer(tmp_path / "in")
    texts(tmp_path / "pairs.jsonl")
    assert main(flags(tmp_path, "--sft_steps", "2")) == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    save = model.save

    def interrupted(path, *args, **more):
        save(path, *args, **more)
        if "step" in more:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(model, "save", interrupted)
        assert main(flags(tmp_path, "--sft_steps", "2")) == 1
    assert "interrupted" in capsys.readouterr().err
    for _ in range(2):
        assert main(["--resume", "--out", str(tmp_path / "out")]) == 0
    whole, again = (model.read(str(tmp_path / name / "ckpt.pt")) for name in ("whole", "out"))
    assert all(torch.equal(whole["model"][key], value) for key, value in again["model"].items())
    assert whole["log"] == again["log"]
    assert again["flags"]["block_size"] == 63
    exports = [(tmp_path / name / "export/model.safetensors").read_bytes() for name in ("whole", "out")]
    assert exports[0] == exports[1]


def test_the_context_is_4096_or_what_the_model_has(tmp_path):
    """A family without limit, and one of 64 tokens, of which <s> takes one."""
    random_model(tmp_path / "in", "bloom")
    random_model(tmp_path / "short")
    for folder in "in", "short":
        byte_tokenizer(tmp_path / folder)
    for folder, expected in {"in": 4096, "short": 63}.items():
        tokenizer = chat.Tokenizer(str(tmp_path / folder))
        assert hf.load(str(tmp_path / folder), tokenizer).config.block_size == expected


WRONG = [
    (["--init_from", "x"], "give --init_from"),
    (["--data", "PAIRS"], "give --init_from"),
    (["--sample", "Hi", "--out", "DONE"], "transformers' pipeline samples"),
    (["RUN", "--tau", "-1"], "--tau is"),
    (["RUN", "--block_size", "9"], "--block_size does nothing here"),
    (["RUN", "--tokenizer", "bytes"], "--tokenizer does nothing here"),
    (["RUN", "--data", "nothing.jsonl"], "no such file"),
    (["RUN", "--out", "DONE"], "holds a run"),
    (["--resume", "--out", "DONE", "--tau", "0.3"], "--tau does nothing here"),
    (["--resume", "--out", "DONE", "--block_size", "9"], "--block_size does nothing here"),
    (["--resume", "--out", "CORE"], "python ipo.py goes on with it")]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a model in `in`, a run of it in `out`, and a run of the core in `core`."""
    path = tmp_path_factory.mktemp("done")
    random_model(path / "in")
    byte_tokenizer(path / "in")
    texts(path / "pairs.jsonl")
    assert main(flags(path)) == 0
    assert ipo.main(["--pairs", "9", "--steps", "1", "--sft_steps", "0", "--out", str(path / "core")]) == 0
    return path


def test_help_names_the_flags_that_count():
    """Those that ipo.py takes with --init_from and --data, but for samples."""
    useful = set()
    for cells in ipo.ROWS:
        row = dict(zip(ipo.NAMES, cells))
        kinds = [row["init_from"], row["file"]]
        if "-" not in kinds and row["flag"] not in ("sample", "temperature"):
            useful.add(f"--{row['flag']}")
    named = set(hf.__doc__.replace(".", " ").replace("\n", " ").split(" "))
    assert useful == {word for word in named if word.startswith("--")} - {"--help"}


@pytest.mark.parametrize("argv, words", WRONG)
def test_command_lines_that_make_no_sense_are_refused(done, tmp_path, argv, words, capsys):
    """In one line, before anything is trained."""
    names = {"PAIRS": done / "pairs.jsonl", "DONE": done / "out", "CORE": done / "core"}
    argv = [str(names.get(word, word)) for word in argv]
    if argv[0] == "RUN":
        argv = [*flags(done), "--out", str(tmp_path / "new"), *argv[1:]]
    capsys.readouterr()
    assert main(argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("hf: ")
    assert words in line
