"""Where do losses end that are no function of IPO's margin, and DPO's with smoothed labels?

w, l: log pi of winner and loser; |.|: tokens; s: sigmoid; beta is --tau. Each minimiser is exact: LBFGS on a
table of logits, the expectation over pairs and labels enumerated (lab/tabular.py).
  cpo    -log s(beta (w - l)) - lam w                                    Xu et al. 2024: DPO without a
    reference
  orpo   -w/|w| - lam log s(odds(w/|w|) - odds(l/|l|))                   Hong et al. 2024; odds(m) = log
    e^m/(1 - e^m)
  slic   max(0, delta - w + l) - lam log pi(an SFT response)             Zhao et al. 2023
  dpo    -log s(beta h);  cdpo  the same, each label e times the other   Rafailov et al. 2023; Mitchell 2023
Traps: cpo, orpo and slic know no reference: tau or lam hold them near the data instead, not near ref. --noise
e flips labels: dpo then has cdpo's expectation, with more noise. The hinge alone has no smooth minimiser.
Answer: at their own minimisers. Bt, beta .5, seed 0: KL(pi||minimiser) .0021 (cpo), .0039 (orpo).
"""
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, relu

import data
import ipo
import model
from lab import start as begin
from lab import tabular


class Side(NamedTuple):
    """One response of each pair; tensors of any one shape."""
    logp: torch.Tensor
    ref_logp: torch.Tensor
    length: torch.Tensor  # in tokens


def cpo(w, l, args):
    return -logsigmoid(args.tau * (w.logp - l.logp)) - args.lam * w.logp


def odds(logp):
    """log of P / (1 - P)."""
    return logp - torch.log(-torch.expm1(logp))


def orpo(w, l, args):
    mean_w, mean_l = w.logp / w.length, l.logp / l.length
    return -mean_w - args.lam * logsigmoid(odds(mean_w) - odds(mean_l))


def slic(w, l, args):  # its SFT term is no part of the pair
    return relu(args.delta - w.logp + l.logp)


def dpo(w, l, args):
    return ipo.dpo_loss(w.logp - w.ref_logp - l.logp + l.ref_logp, 1.0, args.tau)


def cdpo(w, l, args):
    return (1 - args.smoothing) * dpo(w, l, args) + args.smoothing * dpo(l, w, args)


COSTS = {"cpo": cpo, "orpo": orpo, "slic": slic, "dpo": dpo, "cdpo": cdpo}
LAM = {"slic": 0.5}  # where it is not 1


def lengths(pairs):  # -> (R,) tokens of each response
    return pairs.start[1:] - pairs.start[:-1] - pairs.prompt_len


def train(policy, source, ref_logp, args, generator):
    """The loop of ipo.train for a cost of two sides; slic draws SFT responses, too."""
    optimizer, cost, lines = ipo.adamw(policy), COSTS[args.method], []
    length, n = lengths(source.pairs), args.batch_size
    sft = source.sft_rows(n * args.steps, generator)
    order = data.batches(len(source.train), n, args.steps, generator)
    sft_order = data.batches(len(sft), n, args.steps, generator)
    for step, (index, sft_index) in enumerate(zip(order, sft_order), 1):
        pairs = source.train[index]
        rows, p = source.pairs.pair_rows(pairs), source.pairs.p[pairs].to(args.device)
        if args.method == "slic":
            rows = torch.cat([rows, sft[sft_index]])
        with ipo.autocast(args):
            logp = ipo.sequence_logp(policy, *source.pairs.padded(rows, args.device))
        known = logp, ref_logp[rows].to(logp), length[rows].to(logp)
        w, l = (Side(*(x.split(n)[side] for x in known)) for side in (0, 1))
        loss = (p * cost(w, l, args) + (1 - p) * cost(l, w, args)).mean()
        if args.method == "slic":
            loss = loss - args.lam * logp[2 * n:].mean()
        loss.backward()
        ipo.descend(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            lines.append({"step": step, "batch": {"loss": loss.item()}, "eval": source.evaluate(policy)})
            print(f"step {step:5d}/{args.steps} | loss {loss:8.4f}", flush=True)
            model.save(f"{args.out}/ckpt.pt", policy, tokenizer=args.tokenizer, step=step)
            Path(f"{args.out}/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def objective(world, args):
    """log pi (X,Y) -> (): the exact expectation of what `train` descends."""
    cost, length = COSTS[args.method], lengths(world.pairs).view_as(world.ref).double()
    p = world.pstar + args.noise * (1 - 2 * world.pstar)

    def expectation(logp):
        first = Side(logp[:, :, None], world.ref[:, :, None], length[:, :, None])
        second = Side(logp[:, None, :], world.ref[:, None, :], length[:, None, :])
        value = tabular.expected(cost(first, second, args), p, world.mu)
        if args.method == "slic":
            value = value - args.lam * (world.base * logp).sum(-1).mean()
        return value

    return expectation


def minimum(f, starts):  # -> log pi (X,Y), largest difference of its value from another start's
    found = [tabular.minimise(f, start) for start in starts]
    values = torch.stack([f(logp) for logp in found])
    return found[values.argmin()], values.max() - values.min()


def chords(f, ref_logp, generator, n=100):
    """The largest f(middle) - mean f(ends) on chords between random logits: above 0, f is not convex."""
    worst = -torch.inf
    for _ in range(n):
        a, b = 3 * torch.randn(2, *ref_logp.shape, dtype=torch.float64, generator=generator)
        middle, *ends = (f((ref_logp + x).log_softmax(-1)) for x in ((a + b) / 2, a, b))
        worst = max(worst, (middle - sum(ends) / 2).item())
    return worst


def exact(policy, world, args, generator):
    """Numbers by name: the policy against its minimiser, and what is known of that."""
    f = objective(world, args)
    bent = chords(f, world.ref, generator)
    random = torch.randn(world.ref.shape, dtype=torch.float64, generator=generator)
    starts = [world.ref]
    if bent > 0:
        starts += [torch.zeros_like(random), world.ref + 2 * random]
    best, apart = minimum(f, starts)
    print(f"{args.method}: {'not ' * (bent > 0)}convex in the logits, as far as 100 chords show; "
          f"{len(starts)} starts end {apart:.1e} apart")
    logp, wins = world.enumerate(policy), tabular.against(world.pstar, world.mu)
    return data.finite({
        "kl": data.kl(logp, best),
        "kl_ref": data.kl(logp, world.ref),
        "win": (logp.exp() * wins).sum(-1).mean(),
        "gap": f(logp) - f(best),  # of the objective's value
        "exact_kl_ref": data.kl(best, world.ref),
        "exact_win": (best.exp() * wins).sum(-1).mean(),
        "bent": torch.tensor(bent),
        "apart": apart,
    })


def run(argv):
    parser = begin.flags(__doc__)
    parser.add_argument("--method", choices=COSTS, default="cpo", help="which loss [cpo]")
    parser.add_argument("--lam", type=float, help="weight of the other term [slic 0.5, others 1]")
    parser.add_argument("--delta", type=float, default=1.0, help="slic: the margin it asks for [1]")
    parser.add_argument("--smoothing", type=float, default=0.1, help="cdpo: e above [0.1]")
    args = begin.parse(parser, argv, "--tau 0.5 --out out/others", "--out out/others")
    if args.lam is None:
        args.lam = LAM.get(args.method, 1.0)
    begun = time.process_time()
    policy, source, ref_logp, generator = begin.start(args)
    train(policy, source, ref_logp, args, generator)
    numbers = {"name": args.method, "seconds": time.process_time() - begun}
    if args.data in data.WORLDS:
        return args, numbers | exact(policy, source, args, generator)
    known = source.evaluate(policy)
    return args, numbers | {name: known[name] for name in ("h", "chosen", "rejected", "accuracy")}


if __name__ == "__main__":
    sys.exit(begin.report("others", run, sys.argv[1:]))
