"""Sum or mean of token log-probs?

  python -m lab.paper.sum_or_mean                           the sum at tau .2, the mean at five taus
  python -m lab.paper.sum_or_mean --tau 0.5 --mean_tau 2.5  other flags are ipo.py's

The paper's pi(y) is the probability of a whole response, so log pi(y) is a sum over its tokens. Tools that
divide it by their number train another objective: it leads to ref exp(|y| (g/tau + c)), g = E p*, where c
normalises. The world has responses of 1 to 7 tokens here. "own" is the exact answer of a form, "nearest" the
pi* of any tau that is nearest to the trained policy, "best" the highest win rate at its KL to the reference.
Trap: if all lengths were L, the mean at tau would be the sum at tau / L, and nobody would see a difference.
"""
import copy
import sys

import numpy as np
import torch

import data
import ipo
from lab.common import exact, start


class Long(data.World):
    """Two words, at most seven in a response: 255 responses."""

    def __init__(self, name):
        super().__init__(name, ["superb", "dull"], 7)


class LongSource(ipo.WorldSource, Long):
    """The core's source of pairs, in that world."""


def mean_optimum(ref, asked, length):  # (X,Y) each -> (X,Y)
    """log of ref exp(|y| (asked + c)), where the mean form leads; asked: E_mu[target], up to a constant.

    c makes it sum to one. Multiplied by lengths it does not divide out, so it is bisected.
    """
    low = -asked.amax(-1, keepdim=True)
    high = -asked.amin(-1, keepdim=True)
    for _ in range(100):
        c = (low + high) / 2
        total = (ref + length * (asked + c)).logsumexp(-1, keepdim=True)
        low = torch.where(total < 0, c, low)
        high = torch.where(total < 0, high, c)
    return ref + length * (asked + c)


def answer_of(form, tau, source):  # -> (X,Y)
    """log of the policy where a form leads, given endless labels."""
    ref = source.exact["ref"]
    led = exact.limit(ref, source.pstar, source.mu, tau, source.args.labels)
    if form == "sum":
        return led
    length = source.pairs.length - source.pairs.prompt_len  # (R,)
    return mean_optimum(ref, led - ref, length.view_as(ref))


def fit(policy, form, tau, source):
    """IPO from the reference, with the sums, or the means, of the tokens' log-probs. Raises Stopped."""
    args, optimizer = source.args, ipo.adam(policy)
    for step, batch in enumerate(ipo.shuffled_batches(source, args), 1):
        logp = ipo.sequence_logp(policy, batch.tokens, batch.mask)  # (2B,)
        count = batch.mask.sum(1) if form == "mean" else 1          # of tokens: the only difference
        h = ipo.margin(logp / count, batch.ref_logp / count)        # (B,)
        loss = ipo.ipo_loss(h, batch.p, tau).mean()
        loss.backward()
        ipo.optimizer_step(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0:
            ipo.told(f"{form} {tau:g}: {step}/{args.steps}", {"loss": loss.item()})


def measured(logp, form, tau, source):  # -> numbers by name
    """How far a policy is from the answers: exact sums, in nats."""
    ref, pstar, mu = source.exact["ref"], source.pstar, source.mu
    best = data.optimum(ref, ipo.psi(pstar), mu, tau)
    own = answer_of(form, tau, source)
    taus = np.geomspace(30, 0.003, 300)
    g = data.mean_over_opponents(ipo.psi(pstar), mu)
    distances = []
    for other in taus:
        elsewhere = (ref + g / other).log_softmax(-1)
        distances.append(data.kl(logp, elsewhere).item())
    far = data.kl(logp, ref).item()
    kls, wins = exact.frontier(ref, pstar, mu)
    return {
        "to pi*": data.kl(logp, best).item(),
        "to own": data.kl(logp, own).item(),
        "own to pi*": data.kl(own, best).item(),
        "nearest tau": taus[np.argmin(distances)].item(),
        "to that": min(distances),
        "to ref": far,
        "win": exact.win(logp, pstar, mu).item(),
        "best": np.interp(far, kls, wins).item(),
    }


def run(argv=None):
    own = start.parser(__doc__)
    taus = [0.2, 0.5, 0.8, 1.1, 1.5]
    own.add_argument("--tau", type=float, default=0.2, help="of the sum [0.2]")
    own.add_argument("--mean_tau", type=float, nargs="+", default=taus, help=f"of the mean {taus}")
    args = start.parse(own, argv, "--mu ref --out out/sum_or_mean", without=["loss"], world=True)
    start.refuse_twice("--mean_tau", args.mean_tau)
    if not min(args.tau, *args.mean_tau) > 0:
        raise data.Refused("--tau and --mean_tau must be above 0")
    reference, source = start.start(args, LongSource(args))
    table = {}
    plan = [("sum", args.tau), *[("mean", tau) for tau in args.mean_tau]]
    for form, tau in plan:
        policy = copy.deepcopy(reference)
        fit(policy, form, tau, source)
        table[f"{form} {tau:g}"] = measured(source.table(policy), form, tau, source)
    first, *means = table.values()
    close = first["to pi*"]
    nearest = min(row["to that"] for row in means)
    away = max(row["to pi*"] for row in means)
    answer = (f"The sum: at tau {args.tau:g} it ends {close:.4f} nats from pi*. The mean ends up to "
              f"{away:.4f} from pi* of its tau, and never nearer than {nearest:.4f} to that of any tau.")
    figures = {"nats": "".join(f"{name:>12}" for name in first)}
    for name, row in table.items():
        figures[name] = "".join(f"{value:z12.4f}" for value in row.values())
    start.finish(args, answer, figures, table=table)


if __name__ == "__main__":
    sys.exit(start.main("sum_or_mean", run))
