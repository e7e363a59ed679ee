"""What does each margin loss of the literature optimise?

f(z), z = tau h, is what a pair costs whose first response surely won; if it wins with probability p, the pair
costs p f(z) + (1-p) f(-z): a coin flip may stand for p. f, a loss on the margin, and Psi, a map on preference
probabilities, are different objects, linked by argmin_z p f(z) + (1-p) f(-z). If the link of p* is a
difference of two scores (logit's is, under Bradley-Terry) or f is a square (averaging is linear), the
minimiser is pi* of eq. 7 for Psi = link, which ipo.WORTH holds; else it is no pi*. discopop and simpo have no
link; robust has logit's if labels are flipped as often as --label_noise says.

  python -m lab.methods.losses --loss savage --tau 1     ipo.py with nine more losses; other flags are ipo.py's
  python -m lab.methods.losses --table                   every loss at tau 1, hard and soft labels: 5 minutes

Traps: discopop's slope at z = 0 is +.784, its first step leads away from the chosen response. Savage's
vanishes where noise has pushed z. simpo's chosen and rejected are mean log-probs, not ratios; its tau is
another number.
Answer: KL(pi||pi*), bt, tau 1, soft labels: ipo, dpo, rebel, savage and exponential at most .0001,
squared_hinge .0006: they optimise a pi*. discopop .013, slic .060, robust on clean labels .30, exo .32, simpo
1.1 do not.
"""
import argparse
import contextlib
import functools
import json
import math
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.nn.functional import logsigmoid, relu

import data
import ipo


def both_ways(f):  # f(z) -> loss(h, p, tau)
    """The loss of a pair at any p; flags of its own go on to f."""
    @functools.wraps(f)
    def loss(h, p, tau, **own):  # (B,), (B,) -> (B,)
        return p * f(tau * h, **own) + (1 - p) * f(-tau * h, **own)
    return loss


def rebel(h, p, tau):  # (B,), (B,) -> (B,)
    """Gao et al. 2024, arXiv:2404.16767: regression on reward differences: logit p, if Bradley-Terry."""
    return (h - torch.logit(p) / tau) ** 2


@both_ways
def slic(z):
    """Hinge; Zhao et al. 2023, arXiv:2305.10425 (there without a reference); so in GPO, 2402.05749."""
    return relu(1 - z)


@both_ways
def squared_hinge(z):
    """GPO, Tang et al. 2024, arXiv:2402.05749."""
    return relu(1 - z) ** 2


@both_ways
def savage(z):
    """GPO, Tang et al. 2024, arXiv:2402.05749."""
    return torch.sigmoid(-z) ** 2


def exponential(h, p, tau):  # (B,), (B,) -> (B,)
    """GPO, Tang et al. 2024, arXiv:2402.05749: f(z) = exp(-z)."""
    # weights inside the exponents: 0 exp(89) would be 0 * inf in float32
    won = torch.exp(p.log() - tau * h)
    return won + torch.exp((1 - p).log() + tau * h)


@both_ways
def discopop(z):
    """Lu et al. 2024, arXiv:2406.08414, found by search: logistic and exponential mixed, m = s(z / 0.05)."""
    # m exp(-z) as one exponent, for the same reason
    return torch.sigmoid(-z / 0.05) * -logsigmoid(z) + torch.exp(logsigmoid(z / 0.05) - z)


@both_ways
def robust(z, label_noise=0.1):
    """Chowdhury et al. 2024, arXiv:2403.00409: on average DPO of the clean label if that share is flipped."""
    flipped = label_noise * logsigmoid(-z)
    return (flipped - (1 - label_noise) * logsigmoid(z)) / (1 - 2 * label_noise)


@both_ways
def exo(z, e=0.001):
    """Ji et al. 2024, arXiv:2402.00856: KL from the policy's preference (s(z), s(-z)) to (1 - e, e)."""
    won = torch.sigmoid(z) * (logsigmoid(z) - math.log(1 - e))
    return won + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


@both_ways
def simpo(z, gamma=0.1):
    """Meng et al. 2024, arXiv:2405.14734: z of mean log-probs, without a reference."""
    return -logsigmoid(z - gamma)


NEW = [rebel, savage, exponential, squared_hinge, slic, exo, robust, discopop, simpo]
ipo.LOSSES |= {loss.__name__: loss for loss in NEW}
# the links; robust's: of the clean p*, with labels flipped as it assumes
ipo.WORTH |= dict.fromkeys(["rebel", "savage", "robust"], torch.logit)
ipo.WORTH |= {
    "exponential": lambda q: torch.logit(q) / 2,
    "squared_hinge": lambda q: 2 * q - 1,
    "slic": lambda q: (2 * q - 1).sign(),
    "exo": lambda q: (2 * q - 1) * math.log(0.999 / 0.001),
}
core_flags, core_run, core_offline = ipo.flags, ipo.run, ipo.offline


def flags():
    """The core's flags and three more, which config.json and --resume know, too."""
    parser = core_flags()
    parser.description = __doc__
    parser.add_argument("--table", type=float, nargs="?", const=1.0, help="all losses, at this tau [1]")
    parser.add_argument("--label_noise", type=float, default=0.1, help="robust: flips it assumes [0.1]")
    parser.add_argument("--gamma", type=float, default=0.1, help="simpo: asked for beyond tau h > 0 [0.1]")
    return parser


class MeansOfWorld(ipo.WorldSource):
    """SimPO's world: KL, win and J as ever; loss and margins of mean log-probs instead of ratios."""

    def numbers(self, logp):  # (X,Y) -> numbers by name
        length = (self.pairs.start.diff() - self.pairs.prompt_len).view_as(logp)
        means = (logp / length).flatten()[self.pairs.pair_rows(self.train)]
        measured = ipo.measure(means.float(), torch.zeros(()), self.pairs.p, self.args)
        return super().numbers(logp) | measured


class MeansOfFile(ipo.FileSource):
    """SimPO's file: the same."""

    def pose(self, policy, ref_logp, generator):
        self.ref = torch.zeros_like(ref_logp[self.rows])


def no_reference(source, ref_logp, args, generator):
    """ipo.offline with 0 for the reference's log-probs."""
    return core_offline(source, torch.zeros_like(ref_logp), args, generator)


def no_theory(h, loss, logp, p, args):
    print(f"\nstep 0: loss {loss:.6g}; without a reference h is not 0, so theory does not know the loss")


def run(args):
    """ipo.run, with what robust and simpo need; with --table many."""
    if not 0 <= args.label_noise < 0.5:
        raise ipo.Refused(f"--label_noise {args.label_noise} is out of range; give a share below 0.5")
    if args.table:
        return table(args)
    ipo.LOSSES["robust"] = functools.partial(robust, label_noise=args.label_noise)
    ipo.LOSSES["simpo"] = functools.partial(simpo, gamma=args.gamma)
    if args.loss != "simpo":
        return core_run(args)
    args.logp = "mean"
    sources = {"WorldSource": MeansOfWorld, "FileSource": MeansOfFile}
    with mock.patch.multiple(ipo, **sources, offline=no_reference, check_start=no_theory):
        core_run(args)


def distance(args, log, **changes):
    """One run of the table: KL(pi*||ref), KL(pi||pi*), nats; None, None if it was refused or had to stop."""
    one = argparse.Namespace(**vars(args) | {"tau": args.table, "table": None, "overwrite": True} | changes)
    try:
        with contextlib.redirect_stdout(log):
            run(one)
    except (ipo.Refused, ipo.Stopped) as error:
        print(f"{one.out}: {error}")
        return None, None
    report = json.loads(Path(f"{one.out}/report.json").read_text())
    return report["opt"]["kl_ref"], report["after"]["kl_opt"]


def table(args):
    """Every loss, and three with other flags; against logit's pi* where a loss has no link."""
    if args.data not in data.WORLDS:
        raise ipo.Refused(f"--table needs a world, where pi* is known; {args.data} is none")
    ipo.claim(args)
    rows = {loss: {"loss": loss} for loss in ipo.LOSSES}
    rows["savage-slow"] = {"loss": "savage", "lr": args.lr / 5}
    rows |= {f"{loss}-noise": {"loss": loss, "noise": args.label_noise} for loss in ("robust", "dpo")}
    report = {}
    print(f"KL, nats, tau {args.table:g}   pi* to ref   pi to pi*: hard        soft labels")
    with open(f"{args.out}/runs.log", "w") as log, \
            mock.patch.dict(ipo.WORTH, discopop=torch.logit, simpo=torch.logit):
        for name, row in rows.items():
            _, hard = distance(args, log, **row, labels="hard", out=f"{args.out}/{name}-hard")
            to_ref, soft = distance(args, log, **row, labels="soft", out=f"{args.out}/{name}-soft")
            report[name] = {"pi* to ref": to_ref, "hard": hard, "soft": soft}
            print(f"{name:14}" + "".join(f"{ipo.show(kl):>14}" for kl in report[name].values()), flush=True)
    Path(f"{args.out}/report.json").write_text(json.dumps(report, indent=1))


def main(argv=None):
    """ipo.main with this file's losses and flags. Returns the exit status."""
    with mock.patch.multiple(ipo, flags=flags, run=run):
        return ipo.main(argv)


if __name__ == "__main__":
    sys.exit(main())
