"""Can any Hugging Face causal language model be trained by the core's own loop?

  python -m lab.models.hf --init_from MODEL --data FILE.jsonl --out OUT     trains; leaves OUT/export
  python -m lab.models.hf --resume --out OUT                                goes on with an interrupted run

Flags of python ipo.py --help that count, too: --loss --tau --holdout --steps --batch_size --lr --sft_steps
--sft_lr --log_every --device --dtype --seed --overwrite.

MODEL is a folder that transformers saved, or an id of its hub. The core asks a policy for hidden(tokens),
head(x) and its context, so a model of transformers is a policy in a dozen lines. Texts, conversations and the
tokenizer stand in lab/models/chat.py. The context is the model's, up to 4,096 tokens. What the model expects
before any text, say <s>, is the policy's own business: `hidden` puts it before every row.

At load its logits are compared with the model's own, since some models scale them outside the head. They are
also compared with those that it has without later tokens: padding on the right is harmless only if no token
sees what follows. What differs is refused. Dropout is off, or pi would not be ref at step 0.
Trap: weights, gradients and Adam's two averages are float32, 16 bytes a parameter together.
"""
from types import SimpleNamespace

import torch

import data
import ipo
from lab.common import start
from lab.models import chat


class Policy(torch.nn.Module):
    """A model of transformers behind the two methods that the core calls; first: ids before every row."""

    def __init__(self, hf, first=(), block_size=4096):
        super().__init__()
        self.hf = hf.eval()
        self.temperature = 1.0  # divides the logits
        self.cap = getattr(hf.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
        self.register_buffer("first", torch.tensor(first, dtype=torch.int64), persistent=False)
        tables = hf.get_input_embeddings(), hf.get_output_embeddings()
        vocab_size = min(table.weight.shape[0] for table in tables)
        self.config = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)

    def hidden(self, tokens):  # (R,T) -> (R,T,C)
        first = self.first.expand(len(tokens), -1)
        x = self.hf.base_model(torch.cat([first, tokens], 1), use_cache=False).last_hidden_state
        return x[:, len(self.first):]

    def head(self, x):  # (...,C) -> (...,V)
        logits = self.hf.get_output_embeddings()(x)
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits / self.temperature


@torch.no_grad()
def check(policy):
    """Raises ValueError where logits are no head of hidden states, or a token sees later ones."""
    n = min(8, policy.config.block_size)
    tokens = torch.arange(n)[None] % policy.config.vocab_size
    logits = policy.head(policy.hidden(tokens))
    row = torch.cat([policy.first[None], tokens], 1)
    theirs = policy.hf(row).logits[:, len(policy.first):]
    cut = policy.head(policy.hidden(tokens[:, :n // 2]))
    rounding = 1e-4 * (1 + theirs.abs().max())
    off = (logits - theirs).abs().max()
    if not off <= rounding:  # a NaN is refused, too
        raise ValueError(f"its logits are not the head of its hidden states (off by {off:.3g})")
    if not (logits[:, :n // 2] - cut).abs().max() <= rounding:
        raise ValueError("its tokens see later ones: not causal")


def load(name, tokenizer):
    """The Policy of a folder or hub id, for texts of its tokenizer. Raises Refused."""
    try:
        hf, info = chat.quiet().AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:  # they would be random, with a warning
            raise ValueError(f"weights are missing: {sorted(map(str, info['missing_keys']))[:2]}")
        policy = Policy(hf, tokenizer.start, tokenizer.context())
        if tokenizer.n_vocab > policy.config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.n_vocab} ids, more than its model")
        check(policy)
    except Exception as error:  # whatever its HTTP library, safetensors and its own checks raise
        raise chat.refused(name, error, "name a causal language model that transformers saved") from None
    return policy


def parse(argv):
    """The flags of ipo.py that mean something here. Raises Refused."""
    mine, rest = start.parser(__doc__).parse_known_args(argv)
    args = ipo.parse(rest)
    args.program = mine.program
    if args.resume and not str(args.tokenizer).startswith("hf:"):
        raise data.Refused(f"--resume: {args.out} is no run of lab.models.hf; python ipo.py goes on with it")
    if args.sample or args.data in data.WORLDS or not args.init_from:
        raise data.Refused("give --init_from M and --data FILE; transformers' pipeline samples OUT/export")
    return args


def run(argv):
    args = parse(argv)
    tokenizer = chat.Tokenizer(args.init_from)
    policy = load(args.init_from, tokenizer)
    args.tokenizer, args.block_size = tokenizer.name, policy.config.block_size
    pairs = data.read_jsonl(args.data, lambda item, notes: chat.parse_pair(item, notes, tokenizer))
    ipo.run(args, policy, ipo.FileSource(args, tokenizer, pairs))
    policy.hf.save_pretrained(f"{args.out}/export")
    tokenizer.hf.save_pretrained(f"{args.out}/export")
    print(f"\nIt is trained; AutoModelForCausalLM.from_pretrained loads {data.one_line(args.out)}/export.")


if __name__ == "__main__":
    raise SystemExit(start.main("hf", run, threads=torch.get_num_threads()))
