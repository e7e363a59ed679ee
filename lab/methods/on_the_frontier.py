"""Where do all methods end on one picture: how often do they win, how far from the reference?

Reads ref.pt and ckpt.pt of finished runs in a world, whichever program made them, and enumerates each policy.
Its win rate is E p*(y>y'), with y from the policy, y' uniform and p* the true preferences. The frontier is
the highest win rate at each KL(pi||ref): no policy lies above it. `lost` is how far below it a policy lies.

  python -m lab.methods.on_the_frontier out/all --out out/picture    a folder of runs, or several of either
  python -m lab.methods.margin_losses --out out/all                  this makes such a folder
  python -m lab.methods.kto --out out/all/kto                        and this adds a run to it

Traps: a method's tau says where along the frontier it stops, so rows of different taus are no ranking. Runs
of another world or from another reference (another seed) have another frontier; they are skipped, and named.
"""
import sys
from pathlib import Path

import numpy
import torch

import data
import ipo
import model
from lab.common import exact, pictures, start
from lab.methods import descent

class World:
    """The world of a first run, with the frontier of its reference."""

    def __init__(self, saved):
        self.source = ipo.WorldSource(ipo.parse(["--data", saved["flags"]["data"], "--device", "cpu"]))
        self.ref = saved["ref_logp"].view_as(self.source.reward).double()
        self.uniform = torch.full_like(self.ref, 1 / self.ref.shape[1])
        self.kls, self.wins = exact.frontier(self.ref, self.source.pstar, self.uniform)

    def row(self, folder):
        """What became of the run in this folder."""
        logp = self.source.table(model.load(f"{folder}/ckpt.pt")[0])
        kl = data.kl(logp, self.ref).item()
        win = exact.win(logp, self.source.pstar, self.uniform).item()
        below = float(numpy.interp(kl, self.kls, self.wins)) - win
        return descent.Row({"KL to ref": kl, "win rate": win, "lost": below, "made by": made_by(folder)})


def made_by(folder):
    """The program of a run, and the flags that tell its methods apart. (psi is not among them.)"""
    flags = model.read(f"{folder}/ckpt.pt")["flags"]
    program = flags.get("program") or "ipo.py"
    known = [f"{name} {flags[name]}" for name in ("loss", "tau", "labels", "noise") if flags.get(name)]
    return ", ".join([program.removeprefix("lab.methods."), *known])


def read(folders):  # -> World, {name: descent.Row}
    """The runs that belong in one picture with the first; a line for each that does not."""
    world, rows, first = None, {}, None
    for folder in folders:
        saved = model.read(f"{folder}/ref.pt")
        place = saved["flags"]["data"]
        if place not in data.WORLDS:
            print(f"{folder}: skipped, a run on the file {place}, which has no frontier")
            continue
        if world is None:
            world, first = World(saved), saved
        same = torch.equal(saved["ref_logp"], first["ref_logp"])
        if place == first["flags"]["data"] and same:
            rows[Path(folder).name] = world.row(folder)
        else:
            print(f"{folder}: skipped, a run in another world or from another reference than the first")
    if not rows:
        raise data.Refused("no finished run in a world here")
    return world, rows


def draw(rows, world, path):
    """Win rate against KL of the runs, numbered as in the table, on the frontier; and how far below it."""
    figure, axes = pictures.panels(1, 2, width=8, height=6)
    left, right = axes[0]
    left.plot(world.kls, world.wins, "k-")
    for number, (name, row) in enumerate(rows.items(), 1):
        kl, win, below, _ = row.values()
        for axis, y in ((left, win), (right, max(below, 1e-4))):
            axis.plot(kl, y, "o", label=f"{number} {name}")
            axis.annotate(str(number), (kl, y))
    far = max(row["KL to ref"] for row in rows.values())
    left.set(xlim=(0, 1.1 * far), ylabel="win rate; black: the frontier")
    right.set(xscale="log", yscale="log", ylabel="win rate below the frontier")
    figure.supxlabel("KL(pi||ref), nats")
    right.legend(fontsize=12, loc="center left", bbox_to_anchor=(1, 0.5))
    pictures.save(figure, path)


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("folders", nargs="+", help="of a run each, or of folders of runs")
    own.add_argument("--out", default="out/picture", help="folder for the picture [out/picture]")
    args = own.parse_args(argv)
    world, rows = read([found for given in args.folders for found in pictures.folders(given)])
    start.make_folder(args.out)
    draw(rows, world, f"{args.out}/family.png")
    lost = {name: row["lost"] for name, row in rows.items()}
    near = sum(below < 0.0025 for below in lost.values())
    above = sum(below < -1e-6 for below in lost.values())
    lowest = max(lost, key=lost.get)
    said = (f"Of {len(rows)} policies {above} lie above the frontier and {near} at most .0025 below it. "
            f"The lowest is {lowest}, which wins {lost[lowest]:.4f} less than is possible at its KL.")
    start.finish(args, said, descent.table("KL in nats", rows))


if __name__ == "__main__":
    sys.exit(start.main("on_the_frontier", run))
