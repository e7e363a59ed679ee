"""Where do losses end that are no function of IPO's margin, and DPO's with smoothed labels?

w, l: log pi of winner and loser; |.|: tokens; s: sigmoid; beta is --tau. Each minimiser is exact: LBFGS on a
table of logits, the expectation over pairs and labels enumerated (lab/common/exact.py).
  cpo   -log s(beta (w - l)) - lam w                           Xu et al. 2024: DPO without a reference
  orpo  -w/|w| - lam log s(odds(w/|w|) - odds(l/|l|))          Hong et al. 2024; odds(m): logit of e^m
  slic  max(0, delta - w + l) - lam log pi(an SFT response)    Zhao et al. 2023
  dpo   -log s(beta h)                                         Rafailov et al. 2023
  cdpo  (1 - e) dpo(w, l) + e dpo(l, w), e: --smoothing        Mitchell 2023
All but orpo are convex in the logits; of orpo three starts are taken, and they end in the same place.
Traps: cpo, orpo and slic know no reference; their likelihood term holds them near the data. --noise e
flips labels: dpo then has cdpo's expectation. The hinge alone has a staircase for a minimiser, or several.
Answer: bt, seeds 0 1 2, KL to the minimiser: cpo to .0026, orpo .0039, slic .0030, cdpo .0064, dpo .0119.
"""
import sys
import time
from collections import namedtuple

import torch
from torch.nn.functional import logsigmoid, relu

import data
import ipo
from lab.common import start as begin
from lab.common import exact


# one response of each pair, as tensors of any one shape; length in tokens
Side = namedtuple("Side", "logp ref_logp length")


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


def lengths(pairs):  # -> (R,) tokens of each response
    return pairs.start[1:] - pairs.start[:-1] - pairs.prompt_len


def steps(source, args, generator):
    """Yields pairs (B,) and SFT rows (B,) for each step, in random order."""
    n = args.batch_size
    sft = source.sft_rows(n * args.steps, generator)
    order = data.batches(len(source.train), n, args.steps, generator)
    sft_order = data.batches(len(sft), n, args.steps, generator)
    for index, sft_index in zip(order, sft_order):
        yield source.train[index], sft[sft_index]


def batch_loss(policy, source, ref_logp, pairs, sft, args):  # (B,), (B,) -> ()
    """What a step descends; only slic sees the SFT rows."""
    cost, n = COSTS[args.method], len(pairs)
    rows = source.pairs.pair_rows(pairs)
    if args.method == "slic":
        rows = torch.cat([rows, sft])
    with ipo.autocast(args):
        logp = ipo.sequence_logp(policy, *source.pairs.padded(rows, args.device))
    known = Side(logp, ref_logp[rows].to(logp), lengths(source.pairs)[rows].to(logp))
    w = Side(*(x[:n] for x in known))
    l = Side(*(x[n:2 * n] for x in known))
    p = source.pairs.p[pairs].to(logp)
    loss = (p * cost(w, l, args) + (1 - p) * cost(l, w, args)).mean()
    if args.method == "slic":
        loss = loss - args.lam * logp[2 * n:].mean()
    return loss


def train(policy, source, ref_logp, args, generator):
    """The loop of ipo.train for a cost of two sides."""
    optimizer, lines = ipo.adamw(policy), []
    for step, (pairs, sft) in enumerate(steps(source, args, generator), 1):
        loss = batch_loss(policy, source, ref_logp, pairs, sft, args)
        loss.backward()
        ipo.descend(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            begin.keep(policy, lines, step, {"loss": loss.item()}, numbers(policy, source), args)


def numbers(policy, source):
    """Some of what the source says of the policy."""
    wanted = "kl_answer", "kl_ref", "win", "h", "chosen", "rejected", "accuracy"
    known = source.evaluate(policy)
    return {name: known[name] for name in wanted if name in known}


def objective(world, args):
    """log pi (X,Y) -> (): the exact expectation of what `train` descends."""
    cost, length = COSTS[args.method], lengths(world.pairs).view_as(world.ref).double()
    p = world.pstar + args.noise * (1 - 2 * world.pstar)

    def expectation(logp):
        known = Side(logp, world.ref, length)
        w, l = Side(*(x[:, :, None] for x in known)), Side(*(x[:, None, :] for x in known))
        value = exact.expected(cost(w, l, args), p, world.mu)
        if args.method == "slic":
            value = value - args.lam * (world.base * logp).sum(-1).mean()
        return value

    return expectation


def curvature(f, point, generator, n=40):
    """The least eigenvalue of f's second derivatives by logits at this point, divided by the largest; below
    0, beyond rounding, f is not convex. nan if f is flat there."""
    theta = point.clone().requires_grad_()
    slope, = torch.autograd.grad(f(theta.log_softmax(-1)), theta, create_graph=True)

    def farthest(shift):
        """By power iteration: the eigenvalue that lies farthest from `shift`, minus `shift`."""
        v = torch.randn(point.shape, dtype=point.dtype, generator=generator)
        for _ in range(n):
            v = v / v.norm()
            product, = torch.autograd.grad((slope * v).sum(), theta, retain_graph=True)
            product = product - shift * v
            value, v = (v * product).sum().item(), product
        return value

    largest = farthest(0.0)
    flat = abs(largest) < 1e-12  # rounding
    return float("nan") if flat else (largest + farthest(largest)) / largest


def minimum(world, args, generator):
    """(log pi (X,Y), numbers): the minimiser, the least curvature where one response has nearly all mass, and
    by how much the values differ that several starts reach; one start if nothing speaks against convexity."""
    f, shape = objective(world, args), world.ref.shape
    sure = torch.randint(shape[1], (shape[0], 1), generator=generator)
    bent = curvature(f, world.ref.scatter_add(1, sure, torch.full_like(world.mu, 20.0)), generator)
    starts = [world.ref]
    if not bent > -1e-6:
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        starts += [torch.zeros_like(noise), world.ref + 2 * noise]
    found = [exact.minimise(f, start) for start in starts]
    values = torch.stack([f(logp) for logp in found])
    numbers = {"curvature": torch.tensor(bent), "apart": values.max() - values.min()}
    return found[values.argmin()], data.finite(numbers) | {"starts": len(starts)}


def run(argv):
    parser = begin.flags(__doc__)
    parser.add_argument("--method", choices=COSTS, default="cpo", help="which loss [cpo]")
    parser.add_argument("--lam", type=float, help="weight of the other term [slic 0.5, others 1]")
    parser.add_argument("--delta", type=float, default=1.0, help="slic: the margin it asks for [1]")
    parser.add_argument("--smoothing", type=float, default=0.1, help="cdpo: e above [0.1]")
    args = begin.parse(parser, argv, "--tau 0.5 --out out/others", "--out out/others")
    if args.smoothing > 1:
        raise data.Refused(f"--smoothing {args.smoothing} is a share of labels: from 0 to 1")
    if args.lam is None:
        args.lam = 0.5 if args.method == "slic" else 1.0
    policy, source, ref_logp, generator = begin.start(args)
    known = {"name": args.method}
    if args.data in data.WORLDS:
        best, more = minimum(source, args, torch.Generator().manual_seed(args.seed))
        source.exact, known = {"answer": best}, known | more
    begun = time.process_time()
    train(policy, source, ref_logp, args, generator)
    known |= numbers(policy, source) | {"seconds": time.process_time() - begun}
    return args, {"kl": known.pop("kl_answer", None)} | known


if __name__ == "__main__":
    sys.exit(begin.report("others", run, sys.argv[1:]))
