"""Where do losses end that are no function of IPO's margin? CPO, ORPO, SLiC-HF, SimPO, DPOP.

w, l: log pi of the winner and the loser. |w|, |l|: their tokens. s: the sigmoid. h: IPO's margin.
  cpo      -log s(tau (w - l)) - lam w                               Xu et al. 2024: DPO without a reference
  orpo     -w/|w| - lam log s(odds(w/|w|) - odds(l/|l|))             Hong et al. 2024; odds(m): logit of e^m
  slic_hf  max(0, delta - w + l) - lam log pi(an SFT response)       Zhao et al. 2023
  simpo    -log s(tau (w/|w| - l/|l|) - gamma)                       Meng et al. 2024
  dpop     -log s(tau (h - lam max(0, log ref(winner) - w)))         Pal et al. 2024

Eq. 7 says nothing of them. But a world's policy is a table of log-probs, so each has an exact minimiser,
and each row says how far the trained GPT ended from it.

  python -m lab.methods.beyond_the_margin                      all five
  python -m lab.methods.beyond_the_margin --loss cpo --lam 0.5

Traps: only dpop knows the reference; what holds cpo, orpo and slic_hf near the data is their likelihood term,
and simpo has none. cpo, slic_hf and dpop are convex in the logits; of orpo and simpo LBFGS finds a minimum.
With --lam 0 slic_hf is a hinge alone, whose minimiser is a staircase.
"""
import sys
from argparse import Namespace
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, relu

import data
import ipo
from lab.common import exact, start
from lab.methods import descent


class Side(NamedTuple):
    """One response of each pair, as tensors of any one shape."""
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


def slic_hf(w, l, args):  # its SFT term is no part of the pair
    return relu(args.delta - w.logp + l.logp)


def simpo(w, l, args):
    z = args.tau * (w.logp / w.length - l.logp / l.length)
    return -logsigmoid(z - args.gamma)


def dpop(w, l, args):
    h = (w.logp - w.ref_logp) - (l.logp - l.ref_logp)
    return -logsigmoid(args.tau * (h - args.lam * relu(w.ref_logp - w.logp)))


COSTS = {cost.__name__: cost for cost in (cpo, orpo, slic_hf, simpo, dpop)}
FLAGS = ("tau", "lam", "delta", "gamma")
OWN = {  # the flags that each reads, and their values if they are not given
    "cpo": {"tau": 0.5, "lam": 1.0},
    "orpo": {"lam": 1.0},
    "slic_hf": {"lam": 0.5, "delta": 1.0},
    "simpo": {"tau": 2.0, "gamma": 0.5},
    "dpop": {"tau": 0.5, "lam": 5.0},
}


def both_orders(first, second, p, args):
    """What a pair costs whose first response is preferred with probability p."""
    cost = COSTS[args.loss]
    return p * cost(first, second, args) + (1 - p) * cost(second, first, args)


def losses(policy, source, args):
    """Yields the mean cost of each step's pairs; for slic_hf with as many SFT responses as pairs."""
    random = ipo.generator(args, 3)
    for batch in ipo.shuffled_batches(source, args):
        with ipo.precision(args):
            logp = ipo.sequence_logp(policy, batch.tokens, batch.mask)
        halves = [column.chunk(2) for column in (logp, batch.ref_logp, batch.mask.sum(1))]
        chosen, rejected = map(Side._make, zip(*halves))
        loss = both_orders(chosen, rejected, batch.p, args).mean()
        if args.loss == "slic_hf":
            rows = torch.multinomial(source.sft_weight, args.batch_size, True, generator=random)
            sft_logp = ipo.sequence_logp(policy, *source.pairs.padded(rows))
            loss = loss - args.lam * sft_logp.mean()
        yield loss


def expectation(source, args):  # -> a function of log pi (X,Y) that gives ()
    """The exact mean of what `losses` yields."""
    ref, pairs = source.exact["ref"], source.pairs
    length = (pairs.length - pairs.prompt_len).view_as(ref)

    def mean(logp):
        columns = logp, ref, length
        first = Side(*(column[:, :, None] for column in columns))
        second = Side(*(column[:, None, :] for column in columns))
        cost = both_orders(first, second, source.pstar, args)
        value = descent.mean_over_pairs(cost, source.mu)
        if args.loss == "slic_hf":
            value = value - args.lam * (source.base * logp).sum(-1).mean()
        return value

    return mean


def row(loss, args):  # -> descent.Row
    """One run, in a folder of its own."""
    print(f"\n{loss}, in {args.out}")
    policy, source = start.start(args)
    # only now, since the core knows neither this loss nor one without tau; the saved flags are to say so
    args.loss = loss
    if "tau" not in OWN[loss]:
        args.tau = None

    def evaluate(policy):
        logp = source.table(policy)
        return ipo.means({
            "kl_ref": data.kl(logp, source.exact["ref"]),
            "win rate": exact.win(logp, source.pstar, source.mu),
        })

    descent.fit(policy, losses(policy, source, args), args, evaluate)
    mean, logp = expectation(source, args), source.table(policy)
    mine, _ = descent.measured(mean, logp, source, source.pstar)
    flags = " ".join(f"{flag} {getattr(args, flag):g}" for flag in OWN[loss])
    return descent.Row({"flags": flags, **mine})


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--loss", nargs="+", choices=COSTS, default=list(COSTS), help="which [all]")
    own.add_argument("--tau", type=float, help="cpo, dpop [0.5], simpo [2]")
    own.add_argument("--lam", type=float, help="weight of the other term [1, slic_hf 0.5, dpop 5]")
    own.add_argument("--delta", type=float, help="slic_hf: the margin it asks for [1]")
    own.add_argument("--gamma", type=float, help="simpo: asked for beyond z > 0 [0.5]")
    args = start.parse(own, argv, "--out out/beyond_the_margin", descent.USELESS)
    descent.need_world(args)
    start.refuse_twice("--loss", args.loss)
    given = {flag: getattr(args, flag) for flag in FLAGS}
    given = {flag: value for flag, value in given.items() if value is not None}
    read = {flag for loss in args.loss for flag in OWN[loss]}
    for flag in given.keys() - read:
        raise data.Refused(f"--{flag} does nothing for {', '.join(args.loss)}; leave it out")
    start.make_folder(args.out)
    rows = {}
    for loss in args.loss:
        start_with = {"loss": "ipo", "tau": 1.0, "out": f"{args.out}/{loss}"}
        rows[loss] = row(loss, Namespace(**vars(args) | start_with | OWN[loss] | given))
    far = max(row["KL to its minimiser"] or 0 for row in rows.values())
    said = (f"World {args.data}: each ends at the exact minimiser of its own loss, which is no pi*. "
            f"The trained policies of {', '.join(rows)} are at most {far:.4f} nats from there.")
    start.finish(args, said, descent.table("KL, loss in nats", rows))


if __name__ == "__main__":
    sys.exit(start.main("beyond_the_margin", run))
