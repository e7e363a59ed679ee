"""How do I take a policy that ipo.py trained on texts to transformers?

  python -m lab.models.export out/ckpt.pt FOLDER

AutoModelForCausalLM and AutoTokenizer load FOLDER, and so do python -m lab.models.hf and TRL. The logits and
the token ids are the same.
Trap: a world's policy stays here. It emits eight ids and reads thirteen, and GPT-2 has no such head.
"""
import os
import sys

import data
import model
from data import Refused
from lab.common import start
from lab.models import chat


def save_model(policy, eot_token, folder):
    """Writes a core GPT as transformers' GPT2LMHeadModel."""
    transformers = chat.quiet()
    c = policy.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=eot_token, eos_token_id=eot_token))
    weights = policy.state_dict()
    for key in weights:
        # GPT-2 keeps the matrices of its linear layers transposed
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weights[key] = weights[key].T.contiguous()
    theirs.load_state_dict(weights, strict=False)  # the head is the word vectors, and not in ours
    theirs.save_pretrained(folder)


def save_tokenizer(encoding, folder):
    """Writes a tiktoken encoding, "gpt2" or "bytes", as a tokenizer of transformers with the same ids."""
    transformers = chat.quiet()
    from transformers.convert_slow_tokenizer import TikTokenConverter
    pattern = encoding._pat_str.removeprefix("(?s)")  # an option that their regular expressions lack
    converter = TikTokenConverter(None, pattern, extra_special_tokens=[data.EOT])
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # it would read a file
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=data.EOT, eos_token=data.EOT)
    tokenizer.save_pretrained(folder)


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("policy", metavar="RUN.pt", help="ckpt.pt or ref.pt of a run of ipo.py")
    own.add_argument("folder", metavar="FOLDER", help="where transformers shall find it; a new one")
    args = own.parse_args(argv)
    saved = model.read(args.policy)
    sizes = saved["sizes"]
    if "n_embd" not in sizes:
        raise Refused(f"{args.policy}: no GPT of ipo.py; a run of lab.models.hf leaves a folder, OUT/export")
    if sizes["head_size"] < sizes["vocab_size"]:
        raise Refused(f"{args.policy}: a world's policy emits {sizes['head_size']} ids and reads more, as no "
                      "GPT-2 does; export a policy that was trained on a file")
    if os.path.exists(args.folder) and os.listdir(args.folder):
        raise Refused(f"{args.folder} is there and not empty; name a new folder")
    policy, name = model.load(args.policy)
    encoding = data.get_tokenizer(name)
    save_model(policy, encoding.eot_token, args.folder)
    save_tokenizer(encoding, args.folder)
    print(f"The policy and its tokenizer are in {args.folder}; AutoModelForCausalLM and AutoTokenizer load "
          "them.")


if __name__ == "__main__":
    sys.exit(start.main("export", run))
