"""Where do all methods end: how far from the reference, how often do they win, how near to their answer?

Reads the runs in these folders, at any depth, whichever program made them, and enumerates each policy. Its
win rate is E p*(y>y'), with y from the policy, y' uniform and p* the true preferences. The frontier is the
highest win rate at each KL(pi||ref): no policy lies above it. How far a policy ended from its own exact
answer is read from the report.json of the program that trained it.

  python -m lab.methods.on_the_frontier out/all --out out/picture    a table in Markdown, and family.png

The runs in out/all were made before, for example so:

  python -m lab.methods.margin_losses --out out/all/0                a folder for each loss
  python -m lab.methods.kto --out out/all/0/kto                      adds a run to it
  python -m lab.methods.kto --seed 1 --out out/all/1/kto             the same method at another seed

Runs whose folders have one name are one row: their median, lowest and highest, each run measured from its own
reference. Trap: a method's tau says where along the frontier it stops, so rows of different taus are no
ranking.
"""
import statistics
from pathlib import Path

import numpy
import torch

import data
from lab.common import exact, pictures, start

# how programs call the distance from the exact answer in their reports
ANSWERS = {"KL to its minimiser", "KL to its exact answer", "KL(answer||pi)"}


def to_answer(folder):  # -> nats, or None where no report says it
    """Looks also one folder above, where a program of several runs reports a row for each."""
    for where in (folder, folder.parent):
        report = pictures.report_of(where)
        row = report.get(folder.name, report)
        for name in ANSWERS & row.keys():
            return row[name]
    return None


def place(folder):  # -> the world's name, its frontier, {column: number or None}
    world = pictures.source_of(folder)
    logp, ref = pictures.policy_of(folder, world), world.exact["ref"]
    uniform = torch.full_like(ref, 1 / ref.shape[1])
    frontier = exact.frontier(ref, world.pstar, uniform)
    kl = data.kl(logp, ref).item()
    win = exact.win(logp, world.pstar, uniform).item()
    row = {"KL to ref": kl, "win rate": win, "below the frontier": numpy.interp(kl, *frontier) - win}
    row["to its exact answer"] = to_answer(folder)
    return world.args.data, frontier, row


def cell(values):  # -> text
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    text = f"{statistics.median(known):z.4f}"
    return text if len(known) == 1 else f"{text} ({known[0]:z.4f} to {known[-1]:z.4f})"


def draw(methods, frontier, path):
    """Two panels of the methods, numbered as in the table; the frontier is of one run's reference."""
    figure, axes = pictures.panels(1, 2, width=8, height=6)
    for axis, column in zip(axes[0], ("win rate", "below the frontier")):
        for number, (name, rows) in enumerate(methods.items(), 1):
            x, y = [row["KL to ref"] for row in rows], [row[column] for row in rows]
            axis.plot(x, y, "o", label=f"{number} {name}")
            axis.annotate(str(number), (x[0], y[0]), fontsize=12)
        axis.set(xlabel="KL(pi||ref), nats", ylabel=column)
    axes[0, 0].plot(*frontier, "k-", scalex=False, scaley=False)
    axes[0, 1].set(xscale="log", yscale="log", ylabel="win rate below the frontier")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right", fontsize=12)
    pictures.save(figure, path)


def run(argv):
    own = start.parser(__doc__, "out/picture")
    own.add_argument("folders", nargs="+", help="of a run each, or of folders of runs")
    args = own.parse_args(argv)
    methods, worlds, table, lost = {}, set(), {}, []
    files = [path for given in args.folders for path in sorted(Path(given).rglob("ckpt.pt"))]
    for path in files:
        world, frontier, row = place(path.parent)
        worlds.add(world)
        methods.setdefault(path.parent.name, []).append(row)
    if len(worlds) != 1:
        raise data.Refused(f"{' '.join(args.folders)}: runs of {', '.join(worlds) or 'no world'}; "
                           "name folders of finished runs in one world")
    start.make_folder(args.out)
    draw(methods, frontier, f"{args.out}/family.png")
    for number, (name, rows) in enumerate(methods.items(), 1):
        lost += [(each["below the frontier"], name) for each in rows]
        line = start.Row(runs=str(len(rows)))
        for column in row:
            line[column] = cell([each[column] for each in rows])
        table[f"{number} {name}"] = line
    above = sum(below < -1e-6 for below, _ in lost)
    said = (f"Of {len(lost)} policies {above} lie above the frontier. The lowest is one of {max(lost)[1]}, "
            f"which wins {max(lost)[0]:.4f} less than is possible at its KL.")
    start.finish(args, said, start.table("method, KL in nats", table), methods=methods)


if __name__ == "__main__":
    raise SystemExit(start.main("on_the_frontier", run))
