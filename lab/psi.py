"""What does another Psi ask for, and what does the policy give it?

Psi maps a preference probability to its worth. A pair preferred with probability p asks for the margin
target(p) = (Psi(p) - Psi(1-p)) / (2 tau); the policy's margins are the least-squares compromise between all
pairs, so they lie on the target only where target(p*) is a difference of two scores, as logit's is in bt.
  python -m lab.psi --psi tanh                  and any flag of ipo.py; labels are soft unless you say
    otherwise
Two exact columns of the report tell what to expect: `opt` is eq. 7's pi* of this Psi, `labels` where endless
labels lead with this target. Equal if Psi(q) + Psi(1-q) is constant (and, with hard labels, Psi affine); else
they differ. Trap: hard labels are coin flips and see Psi(1) - Psi(0) alone, so whatever Psi, they train a
rescaled identity.
Answer (bt, tau .2, soft labels, seed 0): KL(pi||pi*) .0012 identity, .0000 logit, .0122 tanh, .0017 cubic.
"""
import sys
from pathlib import Path

import torch

import ipo
import model
from lab import plot

PSIS = {
    "identity": lambda q: q,
    "logit": torch.logit,
    "tanh": lambda q: torch.tanh(8 * (q - 0.5)),
    "cubic": lambda q: (2 * q - 1) ** 3,
    "square": lambda q: q ** 2,
    "majority": lambda q: (q > 0.5).float() + 0.5 * (q == 0.5).float(),
}
CARD = (0.5, 0.6, 0.75, 0.9, 0.99, 1.0)


def card(source, policy):
    """{row: its numbers at the p of CARD}: what pairs ask for, what the policy gives, what `labels` has."""
    rows = source.pairs.pair_rows(source.train)
    rows_of = {"target(p)": None, "h reached": source.enumerate(policy)}
    if "labels" in source.exact:
        rows_of["h at labels"] = source.exact["labels"]
    table = {}
    for name, logp in rows_of.items():
        if logp is None:
            table[name] = ipo.target(torch.tensor(CARD), source.args.tau).tolist()
            continue
        chosen, rejected = (logp - source.ref).flatten()[rows].chunk(2)
        h = chosen - rejected
        near = [(source.pairs.p - p).abs() < 0.004 for p in CARD]
        table[name] = [h[pairs].mean().item() for pairs in near]  # nan where no pair is
    return table


def draw(source, policy, name, path):
    """Targets of every Psi against p; dots: the mean margin that the policy reached at each p."""
    figure, axes = plot.panels(1, 1, width=10, height=5)
    q = torch.linspace(0.005, 0.995, 199)
    for i, (psi, f) in enumerate(PSIS.items()):
        asked = (f(q) - f(1 - q)) / (2 * source.args.tau)
        axes[0, 0].plot(q, asked, color=plot.COLOURS[i], linestyle=plot.STYLES[i % 4], label=psi)
    ratios = (source.enumerate(policy) - source.ref).flatten()[source.pairs.pair_rows(source.train)]
    chosen, rejected = ratios.chunk(2)
    p, where = source.pairs.p.unique(return_inverse=True)
    mean = torch.bincount(where, chosen - rejected) / torch.bincount(where)
    axes[0, 0].plot(p, mean, ".", color="black", label=f"reached: {name}")
    limit = 2.2 / source.args.tau
    axes[0, 0].set(xlabel="p = P(chosen preferred)", ylabel="margin, nats", ylim=(-limit, limit))
    figure.legend(loc="outside right center")
    plot.save(figure, path)


def main(argv=None):
    """ipo.main with --psi NAME, then the card and psi.png. Returns the exit status."""
    parser = ipo.Parser(prog="psi.py", description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--psi", choices=PSIS, default="tanh")
    parser.add_argument("--out", default="out/psi")
    theirs = ipo.psi
    try:
        mine, rest = parser.parse_known_args(argv)
        ipo.psi = PSIS[mine.psi]
        status = ipo.main(["--labels", "soft", *rest, "--out", mine.out])
        if status == 0 and "--help" not in rest:
            source, (policy, _) = plot.source_of(mine.out), model.load(f"{mine.out}/ckpt.pt")
            print("\np           " + "".join(f"{p:8.2f}" for p in CARD))
            for name, numbers in card(source, policy).items():
                print(f"{name:12}" + "".join(f"{number:8.2f}" for number in numbers))
            draw(source, policy, mine.psi, str(Path(mine.out, "psi.png")))
        return status
    except (ipo.Refused, model.Refused) as error:
        print(f"psi.py: {error}", file=sys.stderr)
        return 2
    finally:
        ipo.psi = theirs


if __name__ == "__main__":
    sys.exit(main())
