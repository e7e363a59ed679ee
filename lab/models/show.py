"""What does the model see of my pairs, token by token?

    python -m lab.models.show --out RUN         a finished run of ipo.py, or of lab.models.hf

Prints the first pairs: the prompt, then each token of both responses, end of text included, with its log ref
and log pi/ref in nats: what the reference thought of it behind all that stands before it, and what training
made of that. The sums are those in the loss: h is the chosen log pi/ref minus the rejected one, the arrow
shows where the loss wants it. What both responses share at the start has the same log pi/ref, unseen by h.

All comes from the files of the run (config.json, ref.pt, ckpt.pt) and its data, on the CPU: a world's pairs
are drawn again with the run's random numbers. A file edited since then is refused.
Trap: one token's log pi/ref says little. Only sums are trained: what one token gains another may lose.

Answer: in the default run a word has nearly one log pi/ref wherever it stands: superb +0.68 +- .03 nats, good
+0.33 +- .03, dull -0.56 +- .03, awful -0.91 +- .03 (`--pairs 1000`); cold -0.14 +- .50: its worth depends on
the prompt. The sums are those in the loss, to 3e-7 nats.
"""
import argparse
import sys

import torch

import data
import ipo
import model
from data import Refused


@torch.no_grad()
def token_logp(policy, pairs, rows, args):  # (R,) -> R tensors (S,)
    """What ipo.sequence_logp sums: log-probs of the tokens of the responses in these rows of a PairData."""
    found = []
    for part in rows.split(8):
        tokens, mask = pairs.padded(part)
        with ipo.autocast(args):
            x = policy.hidden(tokens[:, :-1], mask[:, 1:])[mask[:, 1:]]  # (S,C)
            logp = policy.head(x).log_softmax(-1, dtype=torch.float32)
        logp = logp.gather(1, tokens[mask][:, None])[:, 0]
        found += logp.split(mask.sum(1).tolist())
    return found


def total(logp, args):  # (S,) -> ()
    """What the loss sees of a response."""
    return logp.mean() if args.logp == "mean" else logp.sum()


def rescore(out, n):
    """(args, source, rows, log ref, log pi) of a run: rows of its first n pairs, each chosen one before its
    rejected one; log-probs are lists of tensors (S,), one a row. Raises Refused."""
    args = ipo.parse(["--resume", "--out", out])
    args.device, policy, source = "cpu", None, None
    if args.tokenizer.startswith("hf:"):
        from lab.models import hf
        policy, source = hf.prepare(args)
    policy, saved = model.load(f"{out}/ref.pt", policy)
    if source is None:
        source = ipo.WorldSource(args) if args.data in data.WORLDS else ipo.FileSource(args)
    changed = Refused(f"--data {args.data} has changed since the run in {out}/: its log-probs are others now")
    if len(saved["ref_logp"]) != len(source.pairs.prompt_len):
        raise changed
    generator = torch.Generator()
    generator.set_state(saved["generator"])
    source.pose(policy, saved["ref_logp"], generator)  # a world draws its pairs here
    first = torch.arange(min(n, len(source.pairs.p)))
    rows = source.pairs.pair_rows(first).view(2, -1).T.flatten()
    ref = token_logp(policy, source.pairs, rows, args)
    sums = torch.stack([total(logp, args) for logp in ref])
    rounding = 1e-2 if args.dtype == "bfloat16" else 1e-4
    if not torch.allclose(sums, saved["ref_logp"][rows], rtol=rounding, atol=1e-3):
        raise changed
    policy, _ = model.load(f"{out}/ckpt.pt", policy)
    return args, source, rows, ref, token_logp(policy, source.pairs, rows, args)


def print_response(name, ids, ref, pi, decode, args):  # (S,), (S,), (S,) -> its two sums, (2,)
    """A line: the sums of log ref and log pi/ref, then each token with its own, grey on a terminal."""
    grey, plain = ("\033[90m", "\033[0m") if sys.stdout.isatty() else ("", "")
    sums = torch.stack([total(ref, args), total(pi - ref, args)])
    words = []
    for token, before, gain in zip(ids.tolist(), ref, pi - ref):
        text = repr(decode([token]))[1:-1]
        words.append(f"{text}{grey}[{before:.2f} {gain:+.2f}]{plain}")
    print(f"  {name:8} {sums[0]:8.2f} {sums[1]:+7.2f} =", *words)
    return sums


def print_tokens(ids, gains, decode):  # (S,), (S,)
    """Which tokens training raised and lowered most, of those that occur at least five times."""
    ids, order = ids.sort()
    tokens, counts = ids.unique_consecutive(return_counts=True)
    found = []
    for token, gain in zip(tokens.tolist(), gains[order].split(counts.tolist())):
        if len(gain) >= 5:
            mean, std = gain.mean().item(), gain.std().item()
            found.append((mean, std, len(gain), repr(decode([token]))))
    found.sort(reverse=True)
    ends = found if len(found) <= 16 else found[:8] + found[-8:]
    if found:
        print(f"\nlog pi/ref of {len(found)} tokens, mean +- standard deviation, each at least 5 times:")
    for mean, std, n, text in ends:
        print(f"  {text:20} {mean:+.2f} +- {std:.2f}, {n} times")


def show(args, source, rows, ref, pi):
    """Prints these pairs, then their tokens."""
    pairs, decode, trained = source.pairs, source.tokenizer.decode, set(source.train.tolist())
    print(f"\nfirst {len(rows) // 2} pairs: token[log ref, log pi/ref] in nats, of responses the {args.logp}")
    for pair in range(len(rows) // 2):
        held = "" if pair in trained else " (held out)"
        print(f"\npair {pair + 1}{held}: {decode(pairs.prompt_ids(rows[2 * pair]))!r}")
        sums = []  # of the chosen response, then of the rejected one
        for name, i in ("chosen", 2 * pair), ("rejected", 2 * pair + 1):
            tokens, mask = pairs.padded(rows[i, None])
            sums.append(print_response(name, tokens[mask], ref[i], pi[i], decode, args))
        p = pairs.p[pair, None]
        numbers = ipo.measure(torch.stack(sums)[:, 1], torch.zeros(2), p, args)
        h, aim, loss = (ipo.show(numbers[key]) for key in ("h", "target", "loss"))
        print(f"  p {p.item():.2f}: h {h} -> {aim}, loss {loss}")
    responses = [pairs.padded(row[None]) for row in rows]
    ids = torch.cat([tokens[mask] for tokens, mask in responses])
    print_tokens(ids, torch.cat(pi) - torch.cat(ref), decode)


def main(argv=None):
    """The command line. Exit status 0, or 2 for bad input, with one line on stderr."""
    parser = ipo.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the run [out]")
    parser.add_argument("--pairs", type=int, default=3, help="how many to show [3]")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parser.parse_args(argv)
        if args.pairs < 1:
            raise Refused(f"--pairs {args.pairs}: nothing to show; give a number from 1")
        show(*rescore(args.out, args.pairs))
        return 0
    except (Refused, model.Refused, OSError) as error:
        print("show.py:", error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
