"""What does the model see of my pairs, token by token?

    python -m lab.show --out RUN         a finished run of ipo.py, or of lab.hf

Prints the first pairs: the prompt, then each token of both responses, end of text included, as token[log ref, log
pi/ref] in nats: what the reference thought of it after all that stands before it, and what training made of that. The
sums are those in the loss: h is the chosen sum of log pi/ref minus the rejected one, and the arrow shows where the
loss wants it. What both responses share at the start moves alike, so it cancels in h: it is learnt from nothing.

It works from the run's files (config.json, ref.pt, ckpt.pt) and its data, on the CPU: a world's pairs are drawn again
with the run's random numbers; a file that was edited since the run has other log-probs than ref.pt, and is refused.
Trap: one token's log pi/ref says little; only sums are trained, so what one token gains another may lose.

Answer: in ANSWER
"""
import argparse
import sys

import torch

import data
import ipo
import model
from data import Refused


@torch.no_grad()
def token_logp(policy, tokens, mask, args):  # (T,), (T,) -> (S,)
    """What ipo.sequence_logp sums: log-probs of the tokens where mask is 1, in nats."""
    with ipo.autocast(args):
        x = policy.hidden(tokens[None, :-1])[0, mask[1:]]  # (S,C)
        logp = policy.head(x).log_softmax(-1, dtype=torch.float32)
    return logp.gather(1, tokens[mask][:, None])[:, 0]


def rescore(out, n):
    """(args, source, rows, log ref, log pi) of a run: rows of its first n pairs, chosen before rejected; the log-probs
    a list with a tensor (S,) per row. Raises Refused."""
    args = ipo.parse(["--resume", "--out", out])
    args.device, policy, source = "cpu", None, None
    if args.tokenizer.startswith("hf:"):
        from lab import hf
        policy, source = hf.prepare(args)
    policy, saved = model.load(f"{out}/ref.pt", policy)
    args.tokenizer, args.block_size = saved["tokenizer"], policy.config.block_size
    source = source or (ipo.WorldSource if args.data in data.WORLDS else ipo.FileSource)(args)
    if len(saved["ref_logp"]) != len(source.pairs.prompt_len):
        raise Refused(f"--data {args.data} has changed since the run in {out}/: it has other pairs now")
    source.pose(policy, saved["ref_logp"], torch.Generator().set_state(saved["generator"]))
    rows = source.pairs.pair_rows(torch.arange(min(n, len(source.pairs.p)))).view(2, -1).T.flatten()
    both = []
    for name in ("ref.pt", "ckpt.pt"):
        policy, _ = model.load(f"{out}/{name}", policy)
        both.append([token_logp(policy, *rows_of(source, row), args) for row in rows])
    again = torch.stack([total(logp, args) for logp in both[0]])
    if not torch.allclose(again, saved["ref_logp"][rows], rtol=1e-2 if args.dtype == "bfloat16" else 1e-4, atol=1e-3):
        raise Refused(f"--data {args.data} has changed since the run in {out}/: its log-probs are not those in ref.pt")
    return args, source, rows, *both


def rows_of(source, row):  # -> (T,), (T,)
    tokens, mask = source.pairs.padded(row[None])
    return tokens[0], mask[0]


def total(logp, args):  # (S,) -> ()
    """What the loss sees of a response."""
    return logp.mean() if args.logp == "mean" else logp.sum()


