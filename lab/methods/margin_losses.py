"""What does each margin loss of the literature optimise?

f(z), with z = tau h, is what a pair costs whose first response surely won. If it wins with probability p, the
pair costs p f(z) + (1-p) f(-z) on average. The z of least cost is a function of p, the loss's link. Where the
links of all pairs are differences of two scores (logit's are, under Bradley-Terry), or f is a square, the
minimiser is pi* of eq. 7 with Psi = link. Elsewhere it is another policy.

  python -m lab.methods.margin_losses                          ten losses at tau 1; rebel needs --labels soft
  python -m lab.methods.margin_losses --loss savage --lr 3e-4  one of them; flags of ipo.py count
  python -m lab.methods.margin_losses --noise 0.1              ipo, dpo, cdpo, robust with flipped labels

cdpo and robust assume the share of flips that --noise makes, or .1 if it makes none.
Each row says where the policy ended: against pi* of the Psi named, for the true preferences, and against the
exact minimiser of this very loss on endless labels of the run's kind, flips included. A Psi in brackets is
not the loss's own link: cdpo and robust are meant to find DPO's pi* behind noise, and discopop has no link.
Traps: discopop's slope at z = 0 is +.784, so its first step leads away from the chosen response. Savage's
slope vanishes where coin flips have pushed z. At p = 1 rebel would ask for an infinite margin.
"""
import functools
import math

import torch
from torch.nn.functional import logsigmoid, relu

import data
import ipo
from lab.common import exact, pictures, start


def both_ways(f):  # f(z) -> loss(h, p, tau)
    """The loss of a pair at any p; flags of its own go on to f."""
    def loss(h, p, tau, **own):  # (B,), (B,) -> (B,)
        return p * f(tau * h, **own) + (1 - p) * f(-tau * h, **own)
    return loss


def rebel(h, p, tau):  # (B,), (B,) -> (B,)
    """Gao et al. 2024, arXiv:2404.16767: regression on reward differences: logit p, if Bradley-Terry."""
    return (h - torch.logit(p) / tau) ** 2


def slic(z):
    """Hinge; Zhao et al. 2023, arXiv:2305.10425 (there without a reference); so in GPO, 2402.05749."""
    return relu(1 - z)


def squared_hinge(z):
    """GPO, Tang et al. 2024, arXiv:2402.05749."""
    return relu(1 - z) ** 2


def savage(z):
    """GPO, Tang et al. 2024, arXiv:2402.05749."""
    return torch.sigmoid(-z) ** 2


def exponential(h, p, tau):  # (B,), (B,) -> (B,)
    """GPO, Tang et al. 2024, arXiv:2402.05749: f(z) = exp(-z)."""
    # weights inside the exponents: 0 exp(89) would be 0 * inf in float32
    won = torch.exp(p.log() - tau * h)
    return won + torch.exp((1 - p).log() + tau * h)


def discopop(z):
    """Lu et al. 2024, arXiv:2406.08414, found by search: logistic and exponential mixed, m = s(z / 0.05)."""
    # m exp(-z) as one exponent, for the same reason
    mixed = torch.exp(logsigmoid(z / 0.05) - z)
    return mixed - torch.sigmoid(-z / 0.05) * logsigmoid(z)


def cdpo(z, label_noise=0.1):
    """Mitchell 2023: DPO with the label smoothed, as if that share of all labels were flipped."""
    return -(1 - label_noise) * logsigmoid(z) - label_noise * logsigmoid(-z)


def robust(z, label_noise=0.1):
    """Chowdhury et al. 2024, arXiv:2403.00409: on average DPO of the true label if that share flips."""
    flipped = label_noise * logsigmoid(-z)
    return (flipped - (1 - label_noise) * logsigmoid(z)) / (1 - 2 * label_noise)


def exo(z, e=0.001):
    """Ji et al. 2024, arXiv:2402.00856: KL from the policy's preference (s(z), s(-z)) to (1 - e, e)."""
    won = torch.sigmoid(z) * (logsigmoid(z) - math.log(1 - e))
    return won + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


OF_Z = savage, squared_hinge, slic, exo, discopop, cdpo, robust
NEW = {"rebel": rebel, "exponential": exponential} | {f.__name__: both_ways(f) for f in OF_Z}
# the Psi whose pi* each loss is held against, as it is shown and as it is computed
PSI = {
    "ipo": ("q", lambda q: ipo.psi(q)),
    "dpo": ("logit q", torch.logit),
    "rebel": ("logit q", torch.logit),
    "savage": ("logit q", torch.logit),
    "exponential": ("logit(q)/2", lambda q: torch.logit(q) / 2),
    "squared_hinge": ("2q - 1", lambda q: 2 * q - 1),
    "slic": ("sign(2q-1)", lambda q: (2 * q - 1).sign()),
    "exo": ("6.9(2q-1)", lambda q: (2 * q - 1) * math.log(0.999 / 0.001)),
    "cdpo": ("(logit q)", torch.logit),
    "robust": ("(logit q)", torch.logit),
    "discopop": ("(logit q)", torch.logit),
}


def add_losses(label_noise):
    """Gives the core's trainer these losses, and the Psi of each."""
    ipo.LOSSES.update(NEW)
    for name in ("cdpo", "robust"):
        ipo.LOSSES[name] = functools.partial(NEW[name], label_noise=label_noise)
    ipo.PSI_OF.update({name: psi for name, (_, psi) in PSI.items()})


class Flipped(ipo.WorldSource):
    """The world with a share --noise of its labels flipped: pstar is of the labels, true what they hide."""

    def __init__(self, args):
        super().__init__(args)
        self.true = self.pstar
        self.pstar = exact.noisy(self.true, args.noise)

    def set_reference(self, ref_logp):
        """Draws flipped labels; pi* is that of the true preferences."""
        super().set_reference(ref_logp)
        worth = ipo.PSI_OF[self.args.loss](self.true)
        self.exact["opt"] = data.optimum(self.exact["ref"], worth, self.mu, self.args.tau)


def expectation(source, args):  # -> a function of log pi (X,Y) that gives ()
    """The exact mean of the run's loss over all pairs and labels of its kind."""
    loss, q, ref = ipo.LOSSES[args.loss], source.pstar, source.exact["ref"]

    def mean(logp):
        h = exact.margins(logp, ref)
        if args.labels == "soft":
            cost = loss(h, q, args.tau)
        else:  # the winner stands first: with probability q it is y, else z, and both orders are in the sum
            cost = 2 * q * loss(h, torch.ones_like(q), args.tau)
        return exact.mean_over_pairs(cost, source.mu)

    return mean


def prepared(name, args):  # -> the source of one run, with its flags in source.args
    """Raises Refused if the labels ask this loss for an infinite margin."""
    one = start.changed(args, loss=name, out=f"{args.out}/{name}")
    source = Flipped(one)
    ipo.refuse_what_cannot_run(source, one)
    return source


def row(source):  # -> start.Row
    """One run of the core, in a folder of its own, and what became of it."""
    one = source.args
    print(data.one_line(f"{one.loss}, in {one.out}"))
    ipo.run(one, source=source)
    trained = pictures.policy_of(one.out, source)
    mine, best = exact.measured(expectation(source, one), trained, source, source.true)
    ref, opt = source.exact["ref"], source.exact["opt"]
    known = ipo.means({
        "pi* to ref": data.kl(opt, ref),
        "policy to pi*": data.kl(trained, opt),
        "minimiser to pi*": data.kl(best, opt),
    })
    if mine["KL to its minimiser"] is None:
        known["minimiser to pi*"] = None
    return start.Row({"pi* of Psi": PSI[one.loss][0]} | known | mine)


def answer(rows, args):
    """A sentence in the words of the question."""
    found = {name: row["minimiser to pi*"] for name, row in rows.items()}
    endless = [name for name, kl in found.items() if kl is None]
    same = [name for name, kl in found.items() if kl is not None and kl < 1e-4]
    other = [f"{name} ({kl:.4f} nats from it)" for name, kl in found.items() if name not in endless + same]
    return (f"World {args.data}, tau {args.tau:g}, {args.labels} labels, {args.noise:.0%} of them flipped. "
            f"These optimise pi* of their Psi: {', '.join(same) or 'none'}. "
            f"These optimise another policy: {', '.join(other) or 'none'}. "
            f"These have no finite optimum: {', '.join(endless) or 'none'}.")


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--loss", nargs="+", choices=PSI, help="which losses [all]")
    own.add_argument("--noise", type=float, default=0.0, help="share of labels that are flipped [0]")
    args = start.parse(own, argv, "--tau 1 --out out/margin_losses", ["loss"], world=True)
    # at p = 1 rebel's target is infinite
    names = args.loss or [name for name in PSI if name != "rebel" or args.labels == "soft"]
    if args.noise and args.loss is None:
        names = ["ipo", "dpo", "cdpo", "robust"]
    start.refuse_twice("--loss", names)
    if args.noise >= 0.5:
        raise data.Refused(f"--noise {args.noise} is no share below 0.5; more would reverse the labels")
    add_losses(args.noise or 0.1)
    start.make_folder(args.out)
    sources = [prepared(name, args) for name in names]
    rows = {source.args.loss: row(source) for source in sources}
    start.finish(args, answer(rows, args), start.table("KL in nats", rows))


if __name__ == "__main__":
    raise SystemExit(start.main("margin_losses", run))
