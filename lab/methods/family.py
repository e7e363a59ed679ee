"""Where do all methods end on one picture: how often do they win, how far from the reference?

Reads the report.json files that ipo.py and the programs of lab/ left in these folders and in the folders in
them (of one world and seed, so of one reference), draws win rate E p*(y>y'), y from the policy, y' uniform,
against KL(pi||ref), and prints a table. No policy lies above the frontier, the optima of eq. 7 for Psi =
identity over all tau; `lost` is how far below it a policy lies, at its KL. A method without a name of its
own goes by its folder's.

  python ipo.py --out out/all/ipo
  python -m lab.methods.online --out out/all/online    and so on, a folder each
  python -m lab.methods.family out/all --out out/all
Trap: runs of another world, seed or --mu have another frontier; they are skipped, and named.
Answer: none of 26 lies above the frontier, 20 lie at most .0025 below it; CPO (.055), ORPO (.041) and KTO
(.028) lie lowest. World bt, seed 0, each method at one tau, .2 to 1.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy
import torch

import data
import ipo
import model
from lab.common import exact


def held(folders):  # -> paths
    """These folders where they hold a report, and the folders in them that do, sorted."""
    paths = [path for folder in folders for path in (folder, *sorted(Path(folder).glob("*")))]
    return [Path(path) for path in paths if (Path(path) / "report.json").exists()]


def read(folder, args):  # -> numbers by name, or None
    """What a finished run says of itself; None, with a line, if it does not belong to this picture."""
    try:
        config = json.loads((folder / "config.json").read_text())
        report = json.loads((folder / "report.json").read_text())
        numbers = {"name": folder.name, "seconds": None} | report.get("after", {}) | report
        exact = "kl" in numbers or "kl_labels" in numbers
        numbers.setdefault("kl", numbers.get("kl_labels", numbers.get("kl_opt")))
        theirs = [config[key] for key in ("data", "seed", "mu")]
        found = {key: numbers[key] for key in ("name", "kl", "kl_ref", "win", "seconds")}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        print(f"{folder}: skipped, no finished run ({type(error).__name__})")
        return None
    if theirs != [args.data, args.seed, "uniform"]:
        print(f"{folder}: skipped, a run in another world: {theirs}")
        return None
    return found | {"exact": exact, "folder": folder}


def frontier(world):  # -> KL(pi||ref), win rate, by rising KL
    """Eq. 7's optima for Psi = identity: no policy wins more at this KL."""
    wins = exact.against(world.pstar, world.mu)  # (X,Y)
    kls, rates = [], []
    for tau in torch.logspace(3, -4.5, 600).tolist():
        best = (world.ref + wins / tau).log_softmax(-1)
        kls.append(data.kl(best, world.ref).item())
        rates.append((best.exp() * wins).sum(-1).mean().item())
    return kls, rates


def picture(runs, kl, win, path):
    """Win rate against KL of the runs, numbered as in the table, on the frontier, and how far below."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(kl, win, "k-", lw=1)
    for number, run in enumerate(runs, 1):
        x, name, color = run["kl_ref"], f"{number} {run['name']}", f"C{number % 10}"
        for axis, y in ((left, run["win"]), (right, max(run["lost"], 1e-4))):
            axis.plot(x, y, "o", color=color, label=name)
            axis.annotate(str(number), (x, y), (3, 4), textcoords="offset points", fontsize=8)
    left.set(xlim=(0, 1.1 * max(run["kl_ref"] for run in runs)), ylabel="win rate; black: frontier")
    right.set(xscale="log", yscale="log", ylabel="win rate below the frontier")
    figure.supxlabel("KL(pi||ref), nats")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def table(runs):
    """A row a run, in Markdown. *: KL to eq. 7's pi*, which need not be where this loss leads."""
    print("| | method | KL to its exact answer | KL to ref | win rate | lost | CPU s |\n" + "|---" * 7 + "|")
    for number, run in enumerate(runs, 1):
        seconds = "-" if run["seconds"] is None else f"{run['seconds']:.0f}"
        figures = f"{run['kl_ref']:.3f} | {run['win']:.3f} | {run['lost']:.4f} | {seconds}"
        star = "" if run["exact"] else "*"
        print(f"| {number} | {run['name']} | {ipo.show(run['kl'])}{star} | {figures} |")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", help="a run's each, or a folder of such folders")
    parser.add_argument("--data", default="bt", choices=data.WORLDS, help="world of the runs [bt]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs [0]")
    parser.add_argument("--out", default="out/family", help="folder of its own files [out/family]")
    args = parser.parse_args(argv)
    try:
        found = [read(folder, args) for folder in held(args.folders)]
        runs = [run for run in found if run]
        if not runs:
            raise data.Refused(f"{args.folders}: no finished run of {args.data}, seed {args.seed}, here")
        world = ipo.WorldSource(ipo.parse(["--data", args.data]))
        world.ref = world.enumerate(model.load(runs[0]["folder"] / "ref.pt")[0])
        world.mu = torch.full_like(world.ref, 1 / world.ref.shape[1])
        kl, win = frontier(world)
        for run in runs:
            run["lost"] = float(numpy.interp(run["kl_ref"], kl, win)) - run["win"]
        table(runs)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(f"{args.out}/report.json").write_text(json.dumps(runs, indent=1, default=str))
        picture(runs, kl, win, f"{args.out}/family.png")
        return 0
    except (data.Refused, model.Refused, OSError, ImportError) as error:
        print("family:", error, file=sys.stderr)
        return 2 if isinstance(error, (data.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
