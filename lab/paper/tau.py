"""What does tau buy: KL to the reference, win rate, distance to the frontier, for each loss?

  python -m lab.paper.grid                                    both losses at four taus, in two minutes
  python -m lab.paper.grid --data deterministic --tau 0.1 1 --steps 100 1000 10000          certain preferences
  python -m lab.paper.grid --tau 0.2 1 --pairs 1000 10000 100000                            few pairs
  python -m lab.paper.grid --loss ipo --tau 0.1 0.2 0.5 --seed 0 1 2 3 4                    how sure are the
    numbers?

A grid over the flags that are given several values (--loss, --tau, --steps, --pairs, --seed); the others are
ipo.py's and hold for all. A run is ipo.run with its flags in OUT/LOSS-TAU: runs of one seed share reference,
pairs and order bit for bit. A row is a median over seeds. "of pi*" is the optimum of the loss's Psi (for dpo
logit); "below" how far the win rate lies below the highest at the run's own KL(pi||ref), which is
lab/common/pictures.py's frontier. Trap: at one tau the losses stand at different places. Compare them at equal KL;
"below" does. Pictures: python -m lab.common.pictures OUT. With --resume runs that were started go on, the others start.
Answer: bt, 500,000 pairs: all eight end within .0021 of the frontier, so neither loss wins more at its KL. At
tau .1 IPO moves 1.16 nats, DPO 5.18, and if preferences are certain DPO's largest log-ratio grows from 14 to
671 with the steps, IPO's not.
"""
import argparse
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np

import data
import ipo
import model
from lab.common import pictures

WORLD = {"kl_ref": "KL to ref", "opt kl_ref": "of pi*", "kl_opt": "KL to pi*", "win": "win rate",
         "opt win": "of pi*", "ratio": "max ratio", "opt ratio": "of pi*", "below": "below"}
FILE = {"loss": "loss", "h": "h", "h_std": "h_std", "chosen": "chosen", "rejected": "rejected",
        "accuracy": "accuracy"}


def short(text):
    """A number as it stands in folders and tables: 1.0 is 1."""
    return f"{float(text):g}"


def plan(grid, rest, out):  # -> {name of a row: [flags of its run with each seed]}
    """All runs of the grid {flag: texts}; flags are checked before the first one starts. Raises Refused."""
    grid = {flag: values for flag, values in grid.items() if values}
    shown = [flag for flag, values in grid.items() if len(values) > 1 or flag in ("loss", "tau")]
    rows = {}
    for values in itertools.product(*grid.values()):
        flags = dict(zip(grid, values))
        row = "-".join(flags[flag] for flag in shown if flag != "seed")
        folder = f"{out}/" + "-".join(flags[flag] for flag in shown)
        started = os.path.exists(f"{folder}/config.json")
        argv = [flag for flag in rest if flag != "--resume" or started]
        argv += [f"--{flag}={value}" for flag, value in flags.items()]
        rows.setdefault(row, []).append(ipo.parse([*argv, "--out", folder]))
    return rows


def measured(out):
    """Numbers by name of the finished run in this folder; in a world also how far below the frontier."""
    run = pictures.read(out)
    optimum = run.report.get("opt", {})
    numbers = {f"opt {name}": value for name, value in optimum.items()} | run.report["after"]
    if run.config["data"] in data.WORLDS:
        best = np.interp(numbers["kl_ref"], *pictures.frontier(pictures.source_of(out)))
        numbers["below"] = best - numbers["win"]
    return numbers


def spread(numbers, name):  # -> lowest, median, highest of the runs; None, which is infinite, is the highest
    values = sorted((run[name] for run in numbers), key=lambda value: np.inf if value is None else value)
    return values[0], values[len(values) // 2], values[-1]


def run(rows, columns, out):
    """Every run, and a line of the table as soon as its seeds are done. 1 if a run stopped, else 0."""
    report, status, ranged = {}, 0, "kl_opt" if "kl_opt" in columns else "h"
    print(f"{'median':16}" + "".join(f"{title:>11}" for title in columns.values()))
    for row, runs in rows.items():
        try:
            with open(f"{out}/runs.log", "a") as log, contextlib.redirect_stdout(log):
                for args in runs:
                    ipo.run(args)
        except ipo.Stopped as error:
            print(f"{args.out}: {error}")
            status = 1
            continue
        numbers = [measured(args.out) for args in runs]
        report[row] = {name: spread(numbers, name) for name in columns}
        low, _, high = map(ipo.show, report[row][ranged])
        seeds = f"   {ranged} {low} to {high}" if len(runs) > 1 else ""
        cells = [ipo.show(report[row][name][1]) for name in columns]
        print(f"{row:16}" + "".join(f"{cell:>11}" for cell in cells) + seeds, flush=True)
        Path(f"{out}/report.json").write_text(json.dumps(report, indent=1))
    return status


def main(argv=None):
    """The command line. Returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ipo.Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--loss", nargs="+", default=["ipo", "dpo"], help="losses [ipo dpo]")
    parser.add_argument("--tau", nargs="+", type=short, default=["0.1", "0.2", "0.5", "1"], help="taus")
    parser.add_argument("--steps", nargs="+", help="steps of preference training, one number or several")
    parser.add_argument("--pairs", nargs="+", help="world: pairs to draw, one number or several")
    parser.add_argument("--seed", nargs="+", help="one or several: rows are medians over these [0]")
    parser.add_argument("--out", default="out/grid", help="folder of the runs and report.json [out/grid]")
    try:
        grid, rest = parser.parse_known_args(argv)
        out = vars(grid).pop("out")
        rows = plan(vars(grid), rest, out)
        whole = ipo.parse([*rest, "--out", out])
        if whole.sample:
            raise ipo.Refused("--sample means nothing for a grid; name a run of it to ipo.py --sample")
        ipo.claim(whole)
        return run(rows, WORLD if whole.data in data.WORLDS else FILE, out)
    except (ipo.Refused, model.Refused, OSError, KeyboardInterrupt) as error:
        print("grid.py:", str(error) or "interrupted; --resume goes on", file=sys.stderr)
        return 2 if isinstance(error, (ipo.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
