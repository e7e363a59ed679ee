"""What does another Psi ask for, and what does the policy give it?

  python -m lab.paper.psi --psi tanh      or identity, logit, cubic, square, majority, yours (what ipo.py holds)
  python -m lab.paper.psi --psi square --labels hard --tau 0.5     the other flags are ipo.py's

A pair preferred with probability p asks for the margin target(p) = (Psi(p) - Psi(1-p)) / (2 tau). ipo.psi is
set, ipo.py runs with soft labels (a pair knows its p), and a card says for some p what pairs ask for, what
they have where the labels lead, and what they have reached; psi.png draws it. The dots are not on their curve
and should not be: a policy is one score a response, so the best is a least-squares compromise between all
pairs, unless target(p*) is a difference of two scores, as logit's is in bt: (r - r')/tau.
The report: `opt` is eq. 7's pi* of Psi, `labels` where endless labels of this kind lead. They differ unless
Psi(q) + Psi(1-q) is constant, since of any other Psi the target sees the odd part (Psi(q) - Psi(1-q))/2; with
hard labels, which see p = 1 alone, also unless that part is affine. The last line says which, and how far.
Trap: logit asks certain pairs for an infinite margin and refuses hard labels: DPO's over-fitting in a number.
Answer: tau .2, KL(pi||ref) and KL(pi||pi*): identity .354, .0012; logit 3.959, .0000; tanh 1.371, .0122;
cubic .480, .0017. square asks for what identity asks for: the same policy, .0092 from square's own pi*.
"""
import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch

import data
import ipo
import model
from lab.common import pictures

PSIS = {
    "identity": lambda q: q,
    "logit": torch.logit,
    "tanh": lambda q: torch.tanh(8 * (q - 0.5)),
    "cubic": lambda q: (2 * q - 1) ** 3,
    "square": torch.square,
    "majority": lambda q: ((2 * q - 1).sign() + 1) / 2,
}
CARD = [0.5, 0.6, 0.75, 0.9, 0.99, 1.0]


def margins(source, logp):  # (X,Y) -> (N,)
    """h of every pair that was drawn, in nats."""
    rows = source.pairs.pair_rows(source.train)
    chosen, rejected = (logp - source.ref).flatten()[rows].chunk(2)
    return chosen - rejected


def at_card(p, h):  # (N,), (N,) -> list
    """Mean h of pairs whose p is near each of the card's; None where there is no such pair."""
    means = [h[(p - q).abs() < 0.004].mean() for q in CARD]
    return [mean.item() if mean.isfinite() else None for mean in means]


def card(tau):
    """{"target": what pairs ask for at the card's p, in nats}; None: infinite."""
    target = ipo.target(torch.tensor(CARD), tau)
    return {"target": [asked.item() if asked.isfinite() else None for asked in target]}


def print_card(card):
    print(f"\n{'p':10}" + "".join(f"{p:>9}" for p in CARD))
    for name, values in card.items():
        print(f"{name:10}" + "".join(f"{ipo.show(value):>9}" for value in values))


def reasons(args):
    """Why `labels` and `opt` differ, a list of texts."""
    def asked(q):  # (Q,) -> (Q,) by labels of this kind on average, times 2 tau
        odd = ipo.psi(q) - ipo.psi(1 - q)
        certain = ipo.psi(torch.ones_like(q)) - ipo.psi(torch.zeros_like(q))
        return odd if args.labels == "soft" else (2 * q - 1) * certain

    q = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    odd = ipo.psi(q) - ipo.psi(1 - q)
    both = ipo.psi(q) + ipo.psi(1 - q)
    flipped = q + args.noise * (1 - 2 * q)
    said = []
    if (both - both[0]).abs().max() > 1e-6:
        said.append("Psi(q) + Psi(1-q) is not constant, and the target sees Psi's odd part only")
    if (asked(q) - odd).abs().max() > 1e-6:
        said.append("Psi's odd part is not affine, so a coin flip cannot stand for p")
    if (asked(flipped) - asked(q)).abs().max() > 1e-6:
        said.append("labels are flipped")
    return said


def draw(psis, name, p, h, args):
    """Target against p, a curve for every Psi, and the mean margin that pairs with each p have reached."""
    figure, axes = pictures.panels(1, 1, width=9)
    axis, q = axes[0, 0], torch.linspace(0.005, 0.995, 199)
    for i, (other, psi) in enumerate(psis.items()):
        target = (psi(q) - psi(1 - q)) / (2 * args.tau)
        axis.plot(q, target, pictures.STYLES[i % 4], color=pictures.COLOURS[i], label=other)
    values, where = p.unique(return_inverse=True)
    reached = torch.bincount(where, h) / torch.bincount(where)
    axis.plot(values, reached, ".", color="black", label=f"reached: {name}")
    axis.set(xlabel="p = P(chosen preferred)", ylabel=f"margin, nats (tau {args.tau:g})")
    axis.set_ylim(-2.2 / args.tau, 2.2 / args.tau)
    figure.legend(loc="outside right center")
    pictures.save(figure, f"{args.out}/psi.png")


def experiment(args, psis, name):
    """A run of ipo.py with ipo.psi as it is now; then card, reasons, picture."""
    numbers = card(args.tau)
    print_card(numbers)
    ipo.run(args)
    source = pictures.source_of(args.out)
    policy, _ = model.load(f"{args.out}/ckpt.pt")
    p, reached = source.pairs.p, margins(source, source.enumerate(policy.to(args.device)))
    numbers["labels"] = at_card(p, margins(source, source.exact["labels"]))
    numbers["reached"] = at_card(p, reached)
    print_card(numbers)
    path = Path(f"{args.out}/report.json")
    report = json.loads(path.read_text())
    why = "; ".join(reasons(args)) or "these labels lead to pi*"
    print(f"KL(labels||pi*) {ipo.show(report['labels']['kl_opt'])} nats: {why}")
    path.write_text(json.dumps(report | {"card": {"p": CARD, **numbers}}, indent=1))
    draw(psis if name == "yours" else PSIS, name, p, reached, args)


def main(argv=None):
    """The command line. Returns the exit status."""
    psis, raw = PSIS | {"yours": ipo.psi}, argparse.RawDescriptionHelpFormatter
    parser = ipo.Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--psi", default="yours", choices=psis, help="Psi by name [yours: that of ipo.py]")
    try:
        own, rest = parser.parse_known_args(argv)
        args = ipo.parse(["--labels", "soft", *rest])
        if args.loss != "ipo" or args.logp != "sum" or args.data not in data.WORLDS or args.sample:
            raise ipo.Refused("needs --loss ipo, --logp sum, a world as --data, and no --sample")
        with mock.patch.object(ipo, "psi", psis[own.psi]):
            experiment(args, psis, own.psi)
        return 0
    except (ipo.Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print("psi.py:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (ipo.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
