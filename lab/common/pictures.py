"""What did these runs do? A picture from the files that they left, and what other programs of lab/ draw with.

  python -m lab.common.pictures OUT [OUT ...]     a run's --out each, or a folder of runs
  python -m lab.common.pictures out/a out/b --out pictures

runs.png: the margin h against the step, and beside it KL(pi||ref) in a world, or for a file the win rate or
else the accuracy on held-out pairs. A colour is a run. Dashed: what a hard label asks h for. Diamond: the
exact pi*. Trap: in a world h is a mean over coin flips that contradict each other. At the optimum it is at
the diamond, not at the dashed line. With soft labels pairs stand as drawn, so h averages to about 0. Where
runs end under the frontier, python -m lab.methods.on_the_frontier draws.
"""
import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import data
import ipo
import model
from lab.common import start

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
DASHED = {"linestyle": (0, (6, 4)), "linewidth": 1.5}
DIAMOND = {"marker": "D", "markersize": 12, "markerfacecolor": "none", "linestyle": "none"}
CURVES = {"h": "margin h, nats", "kl_ref": "KL(pi||ref), nats", "win": "win rate, held out",
          "accuracy": "accuracy, held out"}
# before it is trained the policy is the reference
FIRST = {"step": 0, "h": 0.0, "kl_ref": 0.0, "win": 0.5, "accuracy": 0.5}


class Run(NamedTuple):
    """What a run left, as read from its files."""
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
        raise data.Refused(f"{out}: no ckpt.pt here or one folder below, but {there[:99]}; name a run")
    return [str(path.parent) for path in files]


def report_of(out):
    """What stands in the folder's report.json, a dict; {} if there is none. Raises Refused."""
    path = Path(out, "report.json")
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise data.Refused(f"{path} is damaged ({data.short(error)}); remove it") from None


def read(out):
    """The Run in a folder."""
    saved, report = model.read(f"{out}/ckpt.pt"), report_of(out)
    log = [FIRST, *saved.get("log", [])]
    return Run(saved["flags"], log, report.get("ref", {}), report.get("opt", {}))


def source_of(out):
    """The world of a run, with reference, mu, pairs and optimum as they were. Raises Refused."""
    saved = model.read(f"{out}/ref.pt")
    flags = saved["flags"] | {"device": ipo.DEVICE}  # the run may have been made on another machine
    if flags["data"] not in data.WORLDS or "ref_logp" not in saved:
        raise data.Refused(f"{out}: it is on {flags['data']}, or has no reference; name a run in a world")
    source = ipo.WorldSource(argparse.Namespace(**flags))
    source.set_reference(saved["ref_logp"])
    return source


def policy_of(out, source):  # -> (X,Y)
    """log pi of the run's last checkpoint."""
    policy, _ = model.load(f"{out}/ckpt.pt")
    return source.table(policy.to(source.args.device))


def panels(rows, columns, width=6.5, height=3.8):  # -> figure, axes (rows, columns)
    """Large type, to be read at half the size; width and height of a panel in inches."""
    import matplotlib.figure  # here, since programs of other rooms need it only to draw
    matplotlib.rcParams |= {"font.size": 18, "legend.fontsize": 16, "lines.linewidth": 2.5}
    matplotlib.rcParams |= {"axes.grid": True, "grid.alpha": 0.3}
    figure = matplotlib.figure.Figure(figsize=(width * columns, 2 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path):
    figure.savefig(path, dpi=80)
    print(data.one_line(f"picture: {path}"))


def draw_curves(axis, runs, name):
    """Number `name` of each run's log against the step, a diamond at pi* where the report has it."""
    for number, one in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        steps = [line["step"] for line in one.log]
        label = f"{one.flags['loss']}, tau {one.flags['tau']:g}"
        axis.plot(steps, [line[name] for line in one.log], color=colour, label=label)
        if one.opt.get(name) is not None:
            axis.plot(steps[-1], one.opt[name], color=colour, **DIAMOND)
        hard_ipo = one.flags["loss"] == "ipo" and one.flags["labels"] == "hard"
        if name == "h" and hard_ipo and "loss" in one.ref:
            # a hard label's loss is its target, squared, where h is 0
            axis.axhline(one.ref["loss"] ** 0.5, color=colour, **DASHED)
    axis.set(xlabel="step", ylabel=CURVES[name])


def draw_runs(runs, path):
    """The picture of several runs that the docstring above describes. Raises Refused if there is nothing."""
    # a world's log has all three; the distance says more there
    shown = [name for name in CURVES if all(name in one.log[-1] for one in runs)][:2]
    if not shown or min(len(one.log) for one in runs) < 2:
        raise data.Refused("these runs have no number in common that can be drawn; name runs of one kind")
    figure, axes = panels(1, len(shown), width=9)
    for axis, name in zip(axes[0], shown):
        draw_curves(axis, runs, name)
    if any(one.ref for one in runs):
        axes[0, 0].plot([], [], color="gray", label="a label's target", **DASHED)
    if any(one.opt for one in runs):
        axes[0, 0].plot([], [], color="gray", label="exact pi*", **DIAMOND)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2 + len(shown))
    save(figure, path)


def run(argv=None):
    own = start.parser(__doc__)
    own.add_argument("runs", nargs="+", metavar="OUT", help="folder of a run, or of folders of runs")
    own.add_argument("--out", help="folder of the picture [the first OUT]")
    args = own.parse_args(argv)
    found = [folder for out in args.runs for folder in folders(out)]
    runs = [read(folder) for folder in found]
    out = args.out or args.runs[0]
    os.makedirs(out, exist_ok=True)
    draw_runs(runs, f"{out}/runs.png")
    last = ", ".join(f"{name} after step {one.log[-1]['step']}" for name, one in zip(found, runs))
    print(f"It shows {len(runs)} run(s): {last}.")


if __name__ == "__main__":
    raise SystemExit(start.main("pictures", run))
