"""Sum or mean of token log-probs: where does each form lead?

  python -m lab.paper.sum_or_mean                           the sum at tau .2, the mean at five taus
  python -m lab.paper.sum_or_mean --tau 0.5 --mean_tau 2.5

The paper's pi(y) is the probability of a whole response, so log pi(y) is a sum over its tokens. Tools that
divide it by their number train another objective: it leads to ref exp(|y| (g/tau + c)), g = E p*, where c
normalises. The world has responses of 1 to 7 tokens here, its base distribution is reference and mu, and
nothing is trained: all is exact. "nearest" is the tau, of 300 from 30 to .003, whose pi* is nearest to a
form's policy, "best" the highest win rate at its KL to the reference. Trap: if all lengths were L, the mean
at tau would be the sum at tau / L, and nobody would see a difference.
"""
import numpy as np
import torch

import data
from lab.common import exact, start


class Long(data.World):
    """Two words, at most seven in a response: 255 responses."""

    def __init__(self, name):
        ends = [0.75 ** words / 4 for words in range(6)]  # after each word 1/4 of the texts end
        super().__init__(name, ["superb", "dull"], [0, *ends, 0.75 ** 6])
        self.tokens = (self.pairs.length - 2).view_as(self.reward)  # 2 are the prompt's
        self.ref = exact.of_base(self)
        self.mu = self.ref.exp()
        self.g = data.mean_over_opponents(self.pstar, self.mu)


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


def measured(logp, tau, world):  # -> start.Row
    """How far a policy is from pi* of its tau, and of any tau: exact sums, in nats."""
    taus = np.geomspace(30, 0.003, 300)
    distances = []
    for other in [tau, *taus]:
        best = (world.ref + world.g / other).log_softmax(-1)
        distances.append(data.kl(logp, best).item())
    own, *others = distances
    far = data.kl(logp, world.ref).item()
    kls, wins = exact.frontier(world.ref, world.pstar, world.mu)
    return start.Row({
        "to pi*": own,
        "nearest tau": taus[np.argmin(others)].item(),
        "to that": min(others),
        "to ref": far,
        "win": exact.win(logp, world.pstar, world.mu).item(),
        "best": np.interp(far, kls, wins).item(),
    })


def run(argv=None):
    own = start.parser(__doc__, "out/sum_or_mean")
    taus = [0.2, 0.5, 0.8, 1.1, 1.5]
    own.add_argument("--data", choices=data.WORLDS, default="bt", help="kind of preferences [bt]")
    own.add_argument("--tau", type=float, default=0.2, help="of the sum [0.2]")
    own.add_argument("--mean_tau", type=float, nargs="+", default=taus, help=f"of the mean {taus}")
    args = own.parse_args(argv)
    start.refuse_twice("--mean_tau", args.mean_tau)
    if not min(args.tau, *args.mean_tau) > 0:
        raise data.Refused("--tau and --mean_tau must be above 0")
    start.make_folder(args.out)
    world = Long(args.data)
    led = data.optimum(world.ref, world.pstar, world.mu, args.tau)
    table = {f"sum {args.tau:g}": measured(led, args.tau, world)}
    for tau in args.mean_tau:
        led = mean_optimum(world.ref, world.g / tau, world.tokens)
        table[f"mean {tau:g}"] = measured(led, tau, world)
    _, *means = table.values()
    away = max(row["to pi*"] for row in means)
    nearest = min(row["to that"] for row in means)
    answer = (f"The sum leads to pi*. The mean leads up to {away:.4f} nats from pi* of its tau, "
              f"and never nearer than {nearest:.4f} to that of any tau.")
    start.finish(args, answer, start.table("KL in nats", table), table=table)


if __name__ == "__main__":
    raise SystemExit(start.main("sum_or_mean", run))
