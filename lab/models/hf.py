"""Can any Hugging Face causal language model be trained by the core's own loop?

    python -m lab.models.hf --init_from FOLDER --data FILE.jsonl [flags of ipo.py]     hub id or folder -> OUT/export

The core asks a policy for hidden(tokens), head(x) and its context, so a model of transformers is one in a
dozen lines. Texts, conversations and tokenizer: lab/models/chat.py. --block_size is 4096, and at most what the model
has. What it expects before any text (<s>) is the policy's own business: hidden() puts it before every row.

At load its logits are compared with the model's own (some scale them outside the head), and with those that
it has without later tokens: padding on the right is harmless only if no token sees what follows. What differs
is refused. Dropout is off, or pi would not be ref at step 0. Weights are float32.
Trap: an empty prompt is one end of text, as in the core, behind <s>.

Answer: Llama, Qwen2, Mistral, Gemma, Gemma 2, Phi, GPT-NeoX, Bloom, and GPT-2s that the core refuses, with
random weights: logits equal transformers' own bit for bit, log-probs to 8e-6 nats, and so does the export.
"""
import argparse
import os
import sys
from collections import Counter
from types import SimpleNamespace

import torch
import torch.nn as nn

import data
import ipo
import model
from data import Refused
from lab.models import chat


class Policy(nn.Module):
    """A model of transformers behind the two methods that the core calls; start: ids before every row."""

    def __init__(self, hf, start=(), block_size=4096):
        super().__init__()
        self.hf, text = hf.eval(), hf.config.get_text_config()
        self.cap = getattr(text, "final_logit_softcapping", None)  # Gemma 2
        self.register_buffer("start", torch.tensor(start, dtype=torch.int64), persistent=False)
        tables = hf.get_input_embeddings(), hf.get_output_embeddings()
        limit = getattr(text, "max_position_embeddings", None) or 10**9  # Bloom has none
        self.config = SimpleNamespace(model_type=text.model_type)
        self.config.vocab_size = min(table.weight.shape[0] for table in tables)
        self.config.block_size = min(block_size, limit - len(start))

    def train(self, mode=True):
        """Dropout stays off."""
        return super().train(False)

    def hidden(self, tokens, wanted=None):  # (R,T) -> (R,T,C)
        start = self.start.expand(len(tokens), -1)
        x = self.hf.base_model(torch.cat([start, tokens], 1), use_cache=False).last_hidden_state
        return x[:, len(self.start):]

    def head(self, x):  # (...,C) -> (...,V)
        logits = self.hf.get_output_embeddings()(x)
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


@torch.no_grad()
def check(policy):
    """Raises ValueError where logits are no head of hidden states, or a token sees later ones."""
    n = min(8, policy.config.block_size)
    tokens = torch.arange(n)[None] % policy.config.vocab_size
    logits = policy.head(policy.hidden(tokens))
    theirs = policy.hf(torch.cat([policy.start[None], tokens], 1)).logits[:, len(policy.start):]
    cut = policy.head(policy.hidden(tokens[:, :n // 2]))
    rounding = 1e-4 * (1 + theirs.abs().max())
    off = (logits - theirs).abs().max()
    if not off <= rounding:  # a NaN is refused, too
        raise ValueError(f"its logits are not the head of its hidden states (off by {off:.3g})")
    off = (logits[:, :n // 2] - cut).abs().max()
    if not off <= rounding:
        raise ValueError(f"its tokens see later ones (logits differ by {off:.3g} without them): not causal")


def load(name, tokenizer, block_size=4096):
    """The Policy of a folder or hub id, for texts of its tokenizer. Raises Refused."""
    transformers = model.quiet_transformers()
    try:
        if getattr(transformers.AutoConfig.from_pretrained(name), "is_encoder_decoder", False):
            raise ValueError("an encoder-decoder")
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:  # they would be random, with a warning
            raise ValueError(f"weights are missing: {sorted(map(str, info['missing_keys']))[:2]}")
        policy = Policy(hf, tokenizer.start, block_size)
        if tokenizer.n_vocab > policy.config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.n_vocab} ids, more than its model")
        check(policy)
    except Exception as error:  # whatever its HTTP library, safetensors and its own checks raise
        raise Refused(f"--init_from {name}: {chat.first_line(error)}; name a causal language model, a folder "
                      "that transformers saved or an id of its hub (which needs a network once)") from None
    return policy


def read(path, tokenizer):
    """Yields a Pair per line of a JSONL file; prints what was skipped. Raises Refused."""
    notes = Counter()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                notes["blank lines skipped"] += not line.strip()
                if line.strip():
                    yield chat.parse_line(line, f"{path}:{number}", notes, tokenizer)
    except OSError as error:
        raise Refused(f"--data {path}: {error.strerror}; name a JSONL file") from None
    data.tell(path, notes)


def prepare(args):
    """(policy, source) of these flags, whose tokenizer and block_size it sets. Raises Refused."""
    tokenizer = chat.Tokenizer(args.init_from)
    policy = load(args.init_from, tokenizer, args.block_size)
    args.tokenizer, args.block_size = tokenizer.name, policy.config.block_size
    return policy, ipo.FileSource(args, tokenizer, read(args.data, tokenizer))


def export(policy, tokenizer, folder):
    """Writes what AutoModelForCausalLM and AutoTokenizer load. Raises Stopped."""
    for settings in (policy.hf.generation_config, policy.hf.config):
        ends = settings.eos_token_id
        if tokenizer.eot_token not in (ends if isinstance(ends, list) else [ends]):
            settings.eos_token_id = tokenizer.eot_token  # what was trained to end texts must end them
    try:
        policy.hf.save_pretrained(folder)
        tokenizer.hf.save_pretrained(folder)
    except Exception as error:  # safetensors has its own
        raise ipo.Stopped(f"{folder}: cannot be written ({chat.first_line(error)}); the policy is in "
                          "ckpt.pt; make room, then --resume") from None
    print(f"saved for AutoModelForCausalLM.from_pretrained: {folder}")


def parse(argv):
    """The flags of ipo.py, checked. Raises Refused."""
    about = ipo.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("flags", nargs="*", help="of ipo.py; for worlds, and --tokenizer, do nothing here")
    about.parse_known_args(argv)  # --help ends here
    args = ipo.parse(argv)
    if not args.resume:
        args = ipo.parse(["--block_size", "4096", *argv])
    if args.data in data.WORLDS or not args.init_from or args.sample:
        raise Refused("give --init_from, a folder or hub id of transformers, and --data, a JSONL file; "
                      "samples come from transformers and OUT/export")
    if os.path.realpath(args.init_from) == os.path.realpath(f"{args.out}/export"):
        raise Refused(f"--out {args.out}: its export would replace the model of --init_from; name another")
    return args


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for bad input, with one line on stderr."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        policy, source = prepare(args)
        ipo.run(args, policy, source)
        export(policy, source.tokenizer, f"{args.out}/export")
        return 0
    except (Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print("hf.py:", str(error) or "interrupted; --resume goes on where it was saved", file=sys.stderr)
        return 2 if isinstance(error, (Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
