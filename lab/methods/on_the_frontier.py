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

import numpy
import torch

import data
from lab.common import exact, pictures, start


def read(folders):  # -> the world of the first run, {folder: log pi (X,Y)}
    """The runs that belong in one picture with the first; a line for each that does not."""
    first, found = None, {}
    for folder in folders:
        try:
            world = pictures.source_of(folder)
            first = first or world
            same = torch.equal(world.exact["ref"], first.exact["ref"])
            if world.args.data != first.args.data or not same:
                raise data.Refused("a run in another world or from another reference than the first")
            found[folder] = pictures.policy_of(folder, world)
        except data.Refused as error:
            print(f"{folder}: skipped, {error}")
    if not found:
        raise data.Refused("no finished run in a world here")
    return first, found


def draw(rows, frontier, path):
    """Win rate against KL of the runs, numbered as in the table, and the frontier."""
    figure, axes = pictures.panels(1, 1, width=8, height=6)
    axis = axes[0][0]
    axis.plot(*frontier, "k-")
    for number, (name, row) in enumerate(rows.items(), 1):
        kl, win, _ = row.values()
        axis.plot(kl, win, "o", label=f"{number} {name}")
        axis.annotate(str(number), (kl, win))
    far = max(row["KL to ref"] for row in rows.values())
    axis.set(xlim=(0, 1.1 * far), xlabel="KL(pi||ref), nats", ylabel="win rate; black: the frontier")
    axis.legend(fontsize=12, loc="center left", bbox_to_anchor=(1, 0.5))
    pictures.save(figure, path)


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("folders", nargs="+", help="of a run each, or of folders of runs")
    own.add_argument("--out", default="out/picture", help="folder for the picture [out/picture]")
    args = own.parse_args(argv)
    world, found = read([folder for given in args.folders for folder in pictures.folders(given)])
    ref, uniform = world.exact["ref"], torch.full_like(world.mu, 1 / world.mu.shape[1])
    frontier = exact.frontier(ref, world.pstar, uniform)
    rows = {}
    for folder, logp in found.items():
        kl = data.kl(logp, ref).item()
        win = exact.win(logp, world.pstar, uniform).item()
        lost = float(numpy.interp(kl, *frontier)) - win
        rows[folder] = start.Row({"KL to ref": kl, "win rate": win, "lost": lost})
    start.make_folder(args.out)
    draw(rows, frontier, f"{args.out}/family.png")
    lost = {name: row["lost"] for name, row in rows.items()}
    above = sum(below < -1e-6 for below in lost.values())
    lowest = max(lost, key=lost.get)
    said = (f"Of {len(rows)} policies {above} lie above the frontier. "
            f"The lowest is {lowest}, which wins {lost[lowest]:.4f} less than is possible at its KL.")
    start.finish(args, said, start.table("KL in nats", rows))


if __name__ == "__main__":
    sys.exit(start.main("on_the_frontier", run))
