"""What did these runs do? A picture from the files that they left, and what other programs of lab/ draw with.

  python -m lab.common.pictures OUT [OUT ...]     a run's --out each, or a folder of runs
  python -m lab.common.pictures out/a out/b --out pictures

runs.png: the margin h against the step; in a world KL(pi||ref) against the step and where each run ended,
under the frontier, the highest win rate at each KL; for a file the accuracy on its held-out pairs. Colours
are losses, line styles the runs of a loss in their order. Dashed: what a hard label asks h for. Diamond: the
exact pi*. Trap: in a world h is a mean over coin flips that contradict each other. At the optimum it is at
the diamond, not at the dashed line. With soft labels pairs stand as drawn, so h averages to about 0.
"""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import data
import ipo
import model
from lab.common import exact, start

COLOURS = 2 * ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
STYLES = ["-", "--", ":", "-."]
DASHED = {"linestyle": (0, (6, 4)), "linewidth": 1.5}
DIAMOND = {"marker": "D", "markersize": 12, "markerfacecolor": "none", "linestyle": "none"}
CURVES = {"h": "margin h, nats", "kl_ref": "KL(pi||ref), nats", "accuracy": "accuracy, held out"}
# before it is trained the policy is the reference
FIRST = {"step": 0, "h": 0.0, "kl_ref": 0.0, "accuracy": 0.5}


class Run(NamedTuple):
    """What a run left, as read from its files."""
    name: str    # its folder
    flags: dict
    log: list    # numbers by name, the step among them, a dict for each line of the log
    ref: dict    # numbers of the reference and of pi*; {} for a file, or before the run is finished
    opt: dict


def folders(out):
    """[out], or if it holds folders of runs these, in the order in which they ended. Raises Refused."""
    if os.path.exists(f"{out}/ckpt.pt"):
        return [out]
    if not os.path.isdir(out):
        raise data.Refused(f"{out}: no such folder; name the --out of a run")
    files = sorted(Path(out).glob("*/ckpt.pt"), key=os.path.getmtime)
    if not files:
        there = ", ".join(sorted(os.listdir(out))) or "nothing"
        raise data.Refused(f"{out}: no ckpt.pt here or one folder below, but {there[:200]}{made_by(out)}")
    return [str(path.parent) for path in files]


def made_by(out):
    """Which program made the files in this folder, if report.json says so: the end of a message."""
    try:
        program = json.loads(Path(f"{out}/report.json").read_text())["flags"]["program"]
        return f"; {program} made it, and python -m {program} --help says what that draws"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read(out):
    """The Run in a folder. Raises Refused if it has nothing to draw."""
    saved = model.read(f"{out}/ckpt.pt")
    log = saved.get("log", [])
    if not log or CURVES.keys().isdisjoint(log[-1]):
        raise data.Refused(f"{out}: a run whose log has nothing that is drawn here{made_by(out)}")
    report, columns = Path(f"{out}/report.json"), {}
    if report.exists():
        columns = json.loads(report.read_text())
    ref, opt = columns.get("ref", {}), columns.get("opt", {})
    return Run(out, saved["flags"], [FIRST, *log], ref, opt)


def source_of(out):
    """The world of a run, with reference, mu, pairs and optimum as they were. Raises Refused."""
    saved = model.read(f"{out}/ref.pt")
    flags = saved["flags"] | {"device": ipo.DEVICE}  # the run may have been made on another machine
    if flags["data"] not in data.WORLDS:
        raise data.Refused(f"{out}: a run on the file {flags['data']}; only a world has exact answers")
    source = ipo.WorldSource(argparse.Namespace(**flags))
    if saved["ref_logp"].numel() != source.reward.numel():
        raise data.Refused(f"{out}: a run in a world that is not the core's{made_by(out)}")
    source.set_reference(saved["ref_logp"])
    return source


def policy_of(out, source):  # -> (X,Y)
    """log pi of the run's last checkpoint."""
    policy, _ = model.load(f"{out}/ckpt.pt")
    return source.table(policy.to(source.args.device))


def panels(rows, columns, width=6.5, height=3.8):  # -> figure, axes (rows, columns)
    """Large type, to be read at half the size; width and height of a panel in inches. Raises Refused."""
    try:
        import matplotlib.figure
    except ImportError:
        raise data.Refused("no picture without matplotlib: pip install -r lab/requirements.txt") from None
    matplotlib.rcParams |= {"font.size": 18, "legend.fontsize": 16, "lines.linewidth": 2.5}
    matplotlib.rcParams |= {"axes.grid": True, "grid.alpha": 0.3}
    size = width * columns, 2 + height * rows
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path):
    figure.savefig(path, dpi=80)
    print(f"picture: {path}")


def looks(runs):
    """A colour and a line style for each run: losses differ in colour, runs of one loss in style."""
    losses = [run.flags["loss"] for run in runs]
    colours = dict(zip(dict.fromkeys(losses), COLOURS))
    for number, loss in enumerate(losses):
        style = STYLES[losses[:number].count(loss) % len(STYLES)]
        yield {"color": colours[loss], "linestyle": style}


def draw_curves(axis, runs, name):
    """Number `name` of each run's log against the step, a diamond at pi* where the report has it."""
    for run, look in zip(runs, looks(runs)):
        steps = [line["step"] for line in run.log]
        axis.plot(steps, [line[name] for line in run.log], **look)
        if run.opt.get(name) is not None:
            axis.plot(steps[-1], run.opt[name], color=look["color"], **DIAMOND)
        hard_ipo = run.flags["loss"] == "ipo" and run.flags["labels"] == "hard"
        if name == "h" and hard_ipo and "loss" in run.ref:
            target = run.ref["loss"] ** 0.5  # a hard label's loss is its target, squared, where h is 0
            axis.axhline(target, color=look["color"], **DASHED)
    axis.set(xlabel="step", ylabel=CURVES[name])


def draw_frontier(axis, runs):
    """A dot where each run ended, under the frontier of its world, reference and mu."""
    frontiers, far = set(), 0.0
    for run, look in zip(runs, looks(runs)):
        source = source_of(run.name)
        ref, logp = source.exact["ref"], policy_of(run.name, source)
        kls, wins = exact.frontier(ref, source.pstar, source.mu)
        frontiers.add((tuple(kls), tuple(wins)))
        kl = data.kl(logp, ref).item()
        far = max(far, kl)
        win = exact.win(logp, source.pstar, source.mu).item()
        axis.plot(kl, win, "o", color=look["color"], markersize=10)
    for kls, wins in frontiers:
        axis.plot(kls, wins, color="black", linewidth=1.5, zorder=0)
    axis.set_xlim(-0.03 * far, 1.1 * far + 1e-6)
    axis.set(xlabel=CURVES["kl_ref"], ylabel="win rate against mu")


def draw_runs(runs, path):
    """The picture of several runs that the docstring above describes."""
    world = all(run.flags.get("data") in data.WORLDS for run in runs)
    wanted = ["h", "kl_ref"] if world else ["h", "accuracy"]
    shown = [name for name in wanted if all(name in run.log[-1] for run in runs)]
    if not shown:
        raise data.Refused("these runs have no number in common that can be drawn; name fewer of them")
    count = len(shown) + world
    figure, axes = panels(1, count, width=10 if count == 1 else 6.5)
    for axis, name in zip(axes[0], shown):
        draw_curves(axis, runs, name)
    first = axes[0, 0]
    for run, look in zip(runs, looks(runs)):
        first.plot([], [], label=f"{run.flags['loss']}, tau {run.flags['tau']:g}", **look)
    first.plot([], [], color="gray", label="a label's target", **DASHED)
    first.plot([], [], color="gray", label="exact pi*", **DIAMOND)
    if world:
        draw_frontier(axes[0, -1], runs)
        first.plot([], [], color="black", linewidth=1.5, label="frontier")
    figure.legend(loc="outside upper center", ncols=1 + 2 * len(shown))
    save(figure, path)


def run(argv=None):
    own = start.parser(__doc__)
    own.add_argument("runs", nargs="+", metavar="OUT", help="folder of a run, or of folders of runs")
    own.add_argument("--out", help="folder of the picture [the first OUT]")
    args = own.parse_args(argv)
    runs = [read(folder) for out in args.runs for folder in folders(out)]
    out = args.out or args.runs[0]
    os.makedirs(out, exist_ok=True)
    draw_runs(runs, f"{out}/runs.png")
    last = ", ".join(f"{run.name} after step {run.log[-1]['step']}" for run in runs)
    print(f"It shows {len(runs)} run(s): {last}.")


if __name__ == "__main__":
    sys.exit(start.main("pictures", run))
