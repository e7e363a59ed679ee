"""What does another Psi ask for, and what does the policy give it?

  python -m lab.paper.psi --psi tanh
  python -m lab.paper.psi --psi square --labels hard --tau 0.5     the other flags are ipo.py's

A pair preferred with probability p asks for the margin target(p) = (Psi(p) - Psi(1-p)) / (2 tau). ipo.py runs
with this Psi, and with soft labels (a pair knows its p). A card says for some p what pairs ask for (target),
what they have where endless labels of this kind lead (labels), and what they have reached. What they have is
not what they asked for, and should not be: a policy is one score a response, so the best is a least-squares
compromise between all pairs, unless target(p*) is a difference of two scores, as logit's is in bt:
(r - r')/tau. pi* is eq. 7's of Psi. Labels lead elsewhere unless Psi(q) + Psi(1-q) is constant, since of any
other Psi the target sees the odd part (Psi(q) - Psi(1-q))/2; with hard labels, which see p = 1 alone, also
unless that part is affine. The answer says how far. Trap: logit asks certain pairs for an infinite margin and
refuses hard labels: DPO's over-fitting in a number.
"""
import json
import sys

import torch

import data
import ipo
from lab.common import exact, pictures, start

PSIS = {
    "identity": lambda q: q,
    "logit": torch.logit,
    "tanh": lambda q: torch.tanh(8 * (q - 0.5)),
    "cubic": lambda q: (2 * q - 1) ** 3,
    "square": torch.square,
    "majority": lambda q: ((2 * q - 1).sign() + 1) / 2,  # a step
}
CARD = [0.5, 0.6, 0.75, 0.9, 0.99, 1.0]


def at_card(pstar, h):  # (X,Y,Y), (X,Y,Y) -> list
    """Mean h of pairs whose p is near each of the card's; None where there is no such pair."""
    means = [h[(pstar - p).abs() < 0.004].mean() for p in CARD]
    return [mean.item() if mean.isfinite() else None for mean in means]


def asked(tau):
    """What pairs ask for at the card's p, in nats; None: infinite."""
    target = ipo.target(torch.tensor(CARD), tau)
    return [nats.item() if nats.isfinite() else None for nats in target]


def run(argv=None):
    own = start.parser(__doc__)
    own.add_argument("--psi", default="yours", choices=[*PSIS, "yours"], help="[yours: what ipo.py has]")
    args = start.parse(own, argv, "--labels soft", without=["loss"], world=True)
    ipo.psi = PSIS.get(args.psi, ipo.psi)
    ipo.run(args)
    source = pictures.source_of(args.out)
    ref, pstar, best = source.exact["ref"], source.pstar, source.exact["opt"]
    led = exact.limit(ref, pstar, source.mu, args.tau, args.labels)
    reached = exact.margins(pictures.policy_of(args.out, source), ref)
    card = {
        "target": asked(args.tau),
        "labels": at_card(pstar, exact.margins(led, ref)),
        "reached": at_card(pstar, reached),
    }
    with open(f"{args.out}/report.json") as file:
        report = json.load(file)
    after, away = report["after"], data.kl(led, best).item()
    where = "to pi*" if away < 1e-6 else "elsewhere, as --help explains"
    answer = (f"With {args.psi} as Psi at tau {args.tau:g} the policy ends {after['kl_ref']:z.4f} nats from "
              f"the reference and {after['kl_opt']:z.4f} from pi*.\n"
              f"KL(labels||pi*) {away:z.4f} nats: these labels lead {where}.")
    columns = [str(p) for p in CARD]
    rows = {name: start.Row(zip(columns, values)) for name, values in card.items()}
    table = start.table("margin in nats at p =", rows)
    start.finish(args, answer, table, **report, card=card, kl_labels_opt=away)


if __name__ == "__main__":
    sys.exit(start.main("psi", run))
