"""Where do losses end that are no function of IPO's margin? CPO, ORPO, SLiC-HF, SimPO, DPOP.

w, l: log pi of the winner and the loser. |w|, |l|: their tokens. s: the sigmoid. h: IPO's margin.
  cpo      -log s(tau (w - l)) - lam w                               Xu et al. 2024: DPO without a reference
  orpo     -w/|w| - lam log s(odds(w/|w|) - odds(l/|l|))             Hong et al. 2024; odds(m): logit of e^m
  slic_hf  max(0, delta - w + l) - lam log pi(an SFT response)       Zhao et al. 2023
  simpo    -log s(tau (w/|w| - l/|l|) - gamma)                       Meng et al. 2024
  dpop     -log s(tau (h - lam max(0, log ref(winner) - w)))         Pal et al. 2024

Eq. 7 says nothing of them. But a world's policy is a table of log-probs, so each has an exact minimiser,
and each row says how far the trained GPT ended from it. A dash: the loss falls without end.

  python -m lab.methods.beyond_the_margin                      all five
  python -m lab.methods.beyond_the_margin --loss cpo           one of them; OWN holds tau, lam and the rest

Traps: only dpop knows the reference; what holds cpo, orpo and slic_hf near the data is their likelihood term,
and simpo has none. cpo, slic_hf and dpop are convex in the logits; of orpo and simpo LBFGS finds a minimum.
With lam 0 slic_hf is a hinge alone, whose minimiser is a staircase.
"""
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, relu

import data
import ipo
from lab.common import exact, start


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
OWN = {  # what each reads
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
        logp = ipo.sequence_logp(policy, batch.tokens, batch.mask)
        columns = logp, batch.ref_logp, batch.mask.sum(1)
        halves = zip(*(column.chunk(2) for column in columns))
        chosen, rejected = map(Side._make, halves)
        loss = both_orders(chosen, rejected, batch.p, args).mean()
        if args.loss == "slic_hf":
            rows = torch.multinomial(source.sft_weight, args.batch_size, True, generator=random)
            sft_logp = ipo.sequence_logp(policy, *source.pairs.padded(rows))
            loss = loss - args.lam * sft_logp.mean()
        yield loss


def expectation(source, args):  # -> a function of log pi (X,Y) that gives ()
    """The exact mean of what `losses` yields."""
    ref = source.exact["ref"]
    pairs = source.pairs
    length = (pairs.length - pairs.prompt_len).view_as(ref)

    def mean(logp):
        columns = logp, ref, length
        first = Side(*(column[:, :, None] for column in columns))
        second = Side(*(column[:, None, :] for column in columns))
        cost = both_orders(first, second, source.pstar, args)
        value = exact.mean_over_pairs(cost, source.mu)
        if args.loss == "slic_hf":
            sft_logp = (source.base * logp).sum(-1)
            value = value - args.lam * sft_logp.mean()
        return value

    return mean


def row(loss, args):  # -> start.Row
    """One run, in a folder of its own."""
    print(data.one_line(f"{loss}, in {args.out}"))
    policy, source = start.start(args)
    # only now, since the core knows neither this loss nor one without tau; the saved flags are to say so
    args.loss = loss
    vars(args).update({"tau": None} | OWN[loss])
    evaluate = start.distance("kl_ref", source, source.exact["ref"])
    start.fit(policy, losses(policy, source, args), args, evaluate)
    mean = expectation(source, args)
    return exact.measured(mean, source.table(policy), source, source.pstar)[0]


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--loss", nargs="+", choices=COSTS, default=list(COSTS), help="which [all]")
    args = start.parse(own, argv, "--tau 1 --out out/beyond_the_margin", ["loss", "tau"], world=True)
    start.refuse_twice("--loss", args.loss)
    start.make_folder(args.out)
    rows = {}
    for loss in args.loss:
        one = start.changed(args, loss="ipo", out=f"{args.out}/{loss}")
        rows[loss] = row(loss, one)
    far = max(row["KL to its minimiser"] or 0 for row in rows.values())
    said = (f"Each loss has an exact minimiser of its own, which is no pi*. Policies end at most {far:.4f} "
            "nats from there. A dash: there is none, the loss falls without end.")
    start.finish(args, said, start.table("KL in nats", rows))


if __name__ == "__main__":
    raise SystemExit(start.main("beyond_the_margin", run))
