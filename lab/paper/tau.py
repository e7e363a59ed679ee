"""What does tau buy, for each loss: distance from the reference, win rate, distance to pi*?

  python -m lab.paper.tau                                             both losses at four taus
  python -m lab.paper.tau --data deterministic --tau 0.1 1 --steps 100 1000       certain preferences
  python -m lab.paper.tau --loss ipo --tau 0.1 0.2 --seed 0 1 2       how sure are the numbers?

A run, and a row, for each combination of --loss, --tau, --steps, --pairs and --seed; the other flags are
ipo.py's and hold for all. A run is ipo.run with its flags, in OUT/LOSS-TAU: runs of one seed share reference,
pairs and order bit for bit. "pi*" is the optimum of the loss's Psi (for dpo logit), "ratio" the largest
|log pi/ref|, "below" how far the win rate lies below the highest at the run's own KL to the reference. A dash
stands for 10,000 and more, where DPO's pi* on certain preferences is infinitely far.
Trap: at one tau the losses stand at different places. Compare them at equal KL; "below" does.
"""
import contextlib
import itertools

import numpy as np

import data
import ipo
from lab.common import exact, pictures, start

COLUMNS = {"kl_ref": "KL to ref", "opt kl_ref": "pi* to ref", "kl_opt": "KL to pi*", "win": "win rate",
           "opt win": "pi* wins", "ratio": "ratio", "opt ratio": "pi* ratio", "below": "below"}


def number(text):
    """A number as it stands in folders and tables: 1.0 is 1."""
    return f"{float(text):g}"


def plan(argv):
    """All flags, and the Namespace of each run by the name of its row. Raises Refused."""
    own = start.parser(__doc__)
    own.add_argument("--loss", nargs="+", default=["ipo", "dpo"], help="losses [ipo dpo]")
    own.add_argument("--tau", nargs="+", type=number, default="0.1 0.2 0.5 1".split(), help="[0.1 0.2 0.5 1]")
    own.add_argument("--steps", nargs="+", default=["2200"], help="of preference training [2200]")
    own.add_argument("--pairs", nargs="+", default=["560000"], help="pairs to draw [560000]")
    own.add_argument("--seed", nargs="+", default=["0"], help="one or several of each of these five [0]")
    args = start.parse(own, argv, "--log_every 50 --out out/tau", world=True)
    _, rest = own.parse_known_args(argv)
    several = {name: getattr(args, name) for name in ("loss", "tau", "steps", "pairs", "seed")}
    for name, values in several.items():
        start.refuse_twice(f"--{name}", values)
    runs = {}
    for values in itertools.product(*several.values()):
        flags = dict(zip(several, values))
        in_name = [flags[name] for name in flags if name in ("loss", "tau") or len(several[name]) > 1]
        row = "-".join(in_name)
        given = [f"--{name}={value}" for name, value in flags.items()]
        given += [f"--data={args.data}", f"--out={args.out}/{row}"]
        runs[row] = ipo.parse(["--log_every=50", "--device=cpu", *rest, *given])
        runs[row].program = args.program
    return args, runs


def measured(out):
    """Numbers by name of the finished run in this folder, and of its pi*: exact sums."""
    source = pictures.source_of(out)
    ref = source.exact["ref"]
    numbers = {}
    policies = {"": pictures.policy_of(out, source), "opt ": source.exact["opt"]}
    for name, logp in policies.items():
        numbers[f"{name}kl_ref"] = data.kl(logp, ref)
        numbers[f"{name}kl_opt"] = data.kl(logp, source.exact["opt"])
        numbers[f"{name}win"] = exact.win(logp, source.pstar, source.mu)
        numbers[f"{name}ratio"] = (logp - ref).abs().max()
    best = np.interp(numbers["kl_ref"], *exact.frontier(ref, source.pstar, source.mu))
    numbers["below"] = best - numbers["win"]
    return ipo.means(numbers)


def train(args, runs):
    """Every run, with a line each -> {row: its numbers}, without the runs that had to stop."""
    table = {}
    for done, (row, one) in enumerate(runs.items(), 1):
        print(data.one_line(f"run {done}/{len(runs)}: {one.out}"))
        try:
            with open(f"{args.out}/runs.log", "a") as log, contextlib.redirect_stdout(log):
                ipo.run(one)
            table[row] = measured(one.out)
        except ipo.Stopped as error:
            print(data.one_line(f"{one.out}: {error}"))
    return table


def answer(runs, table):
    """The sentence: how far each loss goes at its least and its largest tau, and what that buys."""
    parts = []
    for loss in dict.fromkeys(runs[row].loss for row in table):
        rows = [row for row in table if runs[row].loss == loss]
        rows.sort(key=lambda row: runs[row].tau)
        ends = [f"{table[row]['kl_ref']:.3f} (tau {runs[row].tau:g})" for row in (rows[0], rows[-1])]
        parts.append(f"{loss} ends {' to '.join(dict.fromkeys(ends))}")
    below = max(numbers["below"] for numbers in table.values())
    return (f"tau buys distance. In nats from the reference {' and '.join(parts)}. At its own distance "
            f"of each run the best policy wins at most {below:.4f} more often.")


def run(argv=None):
    args, runs = plan(argv)
    pictures.panels(1, 1)  # refuses now, and not after the runs, if there is no matplotlib
    start.make_folder(args.out)
    table = train(args, runs)
    if table:
        pictures.draw_runs([pictures.read(runs[row].out) for row in table], f"{args.out}/runs.png")
        rows = {}
        for row, numbers in table.items():
            rows[row] = start.Row({title: numbers[name] for name, title in COLUMNS.items()})
        start.finish(args, answer(runs, table), start.table("loss-tau, KL in nats", rows), table=table)
    if len(table) < len(runs):
        raise ipo.Stopped("some runs had to stop, as said above; lower --lr or raise --tau")


if __name__ == "__main__":
    raise SystemExit(start.main("tau", run))
