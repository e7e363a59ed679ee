"""What did these runs do? Pictures from the files that they left, and what other programs of lab/ draw with.

  python -m lab.common.pictures OUT [OUT ...]     a run's --out each, or a grid's, which stands for its runs
  python -m lab.common.pictures out/a out/b --out pictures

runs.png: the margin h against the step, in a world KL(pi||ref) against the step and win rate against KL, for
a file the accuracy on its held-out pairs. Colours are losses, line styles the runs of a loss in their order.
Dashed: the mean target of the pairs, with hard labels what a certain pair asks for (none if infinite).
Diamond: the exact pi*. Nothing is measured here but the frontier, the highest E p*(y>y') at each KL(pi||ref):
pi* of Psi = identity maximises E p* - tau KL, so those of all taus are the frontier, whatever Psi or loss the
runs had. It needs ref.pt, beside the config.json, metrics.jsonl and report.json that the curves are read
from. Trap: in a world h is a mean over coin flips that contradict each other. At the optimum it is at the
diamond, not at the dashed line. With soft labels pairs stand as drawn, so h averages to about 0.
Answer: in bt, tau .1 to 1, IPO and DPO end on one curve, at most .0021 below the frontier; tau says where on
it.
"""
import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import data
import ipo
import model

COLOURS = 2 * ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
STYLES = ["-", "--", ":", "-."]
DASHED = {"linestyle": (0, (6, 4)), "linewidth": 1.5}
DIAMOND = {"marker": "D", "markersize": 12, "markerfacecolor": "none", "linestyle": "none"}
NAMES = {"step": "step", "h": "margin h, nats", "kl_ref": "KL(pi||ref), nats", "win": "win rate against mu",
         "accuracy": "accuracy, held out"}
PANELS = [("step", "h"), ("step", "kl_ref"), ("kl_ref", "win"), ("step", "accuracy")]  # at most three


class Run(NamedTuple):
    """What a run left, as read from its files."""
    out: str      # its folder
    config: dict  # its flags
    steps: list   # when it was evaluated; step 0, the reference, is known once the run is finished
    evals: list   # numbers by name, a dict for each of these steps
    report: dict  # {} before it is finished


def folders(out):
    """[out], or if it holds folders of runs these, in the order in which they ended."""
    files = sorted(Path(out).glob("*/metrics.jsonl"), key=os.path.getmtime)
    found = [out] if os.path.exists(f"{out}/metrics.jsonl") else [str(path.parent) for path in files]
    if not found:
        raise ipo.Refused(f"{out}: no metrics.jsonl here or one folder below; name the --out of a run")
    return found


def read(out):
    """The Run in a folder. Raises Refused."""
    config, report = ipo.saved_flags(out), Path(f"{out}/report.json")
    try:
        lines = [json.loads(line) for line in Path(f"{out}/metrics.jsonl").read_text().splitlines()]
        report = json.loads(report.read_text()) if report.exists() else {}
        before = [{"step": 0, "eval": report["before"]}] if report else []
        steps, evals = zip(*[(line["step"], line["eval"]) for line in before + lines])
        return Run(out, config, steps, evals, report)
    except (ValueError, KeyError) as error:
        raise ipo.Refused(f"{out}: not the files of a run ({error!r}); name its --out") from None


def source_of(out):
    """The world of the run in this folder with its reference, mu, pairs, optima, bit for bit as they were."""
    args = argparse.Namespace(**ipo.saved_flags(out))
    reference, saved = model.load(f"{out}/ref.pt")
    generator = torch.Generator()
    generator.set_state(saved["generator"])
    source = ipo.WorldSource(args)
    with contextlib.redirect_stdout(io.StringIO()):  # what it prints was printed when the run began
        source.pose(reference.to(args.device), saved["ref_logp"], generator)
    return source


def frontier(source):
    """(KL(pi||ref), win rate against mu), two tuples by rising KL: no policy wins more often at that KL."""
    wins = (source.pstar * source.mu[:, None, :]).sum(-1)       # (X,Y)
    tau = 3000 * 1e-8 ** torch.linspace(0, 1, 600)[:, None, None]
    best = (source.ref + wins / tau).log_softmax(-1)            # (600,X,Y)
    kls = (best.exp() * (best - source.ref)).sum(-1).mean(-1)   # (600,)
    rates = (best.exp() * wins).sum(-1).mean(-1)
    return tuple(kls.tolist()), tuple(rates.tolist())


def panels(rows, columns, width=6.5, height=3.8):  # -> figure, axes (rows, columns)
    """Large type, to be read at half the size; width and height of a panel in inches. Raises Refused."""
    try:
        import matplotlib.figure
    except ImportError:
        raise ipo.Refused("no picture without matplotlib: pip install -r lab/requirements.txt") from None
    matplotlib.rcParams |= {"font.size": 18, "legend.fontsize": 16, "lines.linewidth": 2.5}
    matplotlib.rcParams |= {"axes.grid": True, "grid.alpha": 0.3}
    size = width * columns, 2 + height * rows
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path):
    figure.savefig(path, dpi=80)
    print(f"picture: {path}")


def draw_curve(axis, run, x, y, **look):
    """Number y against x (a number or "step"), a dot at the end, a diamond at pi* where that is known."""
    optimum = {"step": run.steps[-1], **run.report.get("opt", {})}
    across = run.steps if x == "step" else [numbers[x] for numbers in run.evals]
    values = [numbers[y] for numbers in run.evals]
    axis.plot(across, values, marker="o", markevery=[-1], markersize=9, **look)
    if optimum.get(x) is not None and optimum.get(y) is not None:
        axis.plot(optimum[x], optimum[y], color=look["color"], **DIAMOND)
    axis.set(xlabel=NAMES[x], ylabel=NAMES[y])


def draw_runs(runs, path):
    """The picture of several runs that the docstring above describes."""
    shown = [(x, y) for x, y in PANELS if all(y in run.evals[-1] for run in runs)][:3]
    figure, axes = panels(1, len(shown), width=10 if len(shown) == 1 else 6.5)
    losses = [run.config["loss"] for run in runs]
    colours = dict(zip(dict.fromkeys(losses), COLOURS))
    for i, (run, loss) in enumerate(zip(runs, losses)):
        look = {"color": colours[loss], "linestyle": STYLES[losses[:i].count(loss) % 4]}
        for axis, (x, y) in zip(axes[0], shown):
            draw_curve(axis, run, x, y, **look)
        axes[0, 0].plot([], [], label=f"{loss}, tau {run.config['tau']:g}", **look)
        asked = run.report.get("before", {}).get("target")
        if asked is not None:
            axes[0, 0].axhline(asked, color=look["color"], **DASHED)
    axes[0, 0].plot([], [], color="gray", label="mean target", **DASHED)
    if any("opt" in run.report for run in runs):
        axes[0, 0].plot([], [], color="gray", label="exact pi*", **DIAMOND)
    if ("kl_ref", "win") in shown:
        draw_frontiers(axes[0, shown.index(("kl_ref", "win"))], runs)
    figure.legend(loc="outside upper center", ncols=1 + 2 * len(shown))
    save(figure, path)


def draw_frontiers(axis, runs):
    """The exact frontier of each world, reference and mu among these runs, as far as they went."""
    for kls, wins in {frontier(source_of(run.out)) for run in runs if run.config["data"] in data.WORLDS}:
        axis.plot(kls, wins, color="black", linewidth=1.5, zorder=0)
    axis.plot([], [], color="black", linewidth=1.5, label="exact frontier")
    far = max(numbers["kl_ref"] for run in runs for numbers in run.evals)
    axis.set_xlim(-0.03 * far, 1.1 * far + 1e-6)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = ipo.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="OUT", help="folder of a run or of a grid")
    parser.add_argument("--out", default="", help="folder of the picture [the first OUT]")
    try:
        args = parser.parse_args(argv)
        runs = [read(folder) for out in args.runs for folder in folders(out)]
        args.out = args.out or args.runs[0]
        os.makedirs(args.out, exist_ok=True)
        draw_runs(runs, f"{args.out}/runs.png")
        return 0
    except (ipo.Refused, model.Refused, OSError, KeyboardInterrupt) as error:
        print("plot.py:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (ipo.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
