"""How far does a trained GPT end from the exact minimiser of its own loss, whatever that is?

Reads finished runs of ipo.py and of lab/methods/losses.py in a world. Their losses are functions of the margin h, so
the mean over endless pairs and labels of the run's kind (--mu, --labels, --noise) is a sum over all pairs. A
table of log-probs minimises it: LBFGS in float64 (lab/common/exact.py), from the reference and from the trained
policy; the lower counts. `apart`: by how much the two values differ; `gap`: the trained policy's mean loss
less the lower; kl_ref, h_max: where the minimiser lies. --logp mean, and simpo: h of mean log-probs.
Trap: a loss that falls without end has no minimiser. If log pi/ref passes 100 nats this is taken to be so,
and kl is a dash: dpo in the world deterministic, robust and exo where preferences are surer than they assume.

  python -m lab.methods.losses --loss discopop --tau 1 --out out/all/discopop     and others, a folder each
  python -m lab.methods.minimiser out/all
Answer: bt, tau 1, hard labels: within .0003 nats (exponential, squared_hinge) to .0109 (simpo), .0207 (slic);
exo (.2162) is not trained to its end in 2,000 steps, discopop (.0047) has several minima.
"""
import argparse
import functools
import json
import sys
from pathlib import Path

import torch

import data
import ipo
import model
from lab.common import exact
from lab.methods import family, losses


def read(folder):
    """(args, world with its reference, log pi (X,Y) of the trained policy) of a run."""
    args = argparse.Namespace(**json.loads((folder / "config.json").read_text()))
    foreign = {"method", "pairs_from", "rounds", "z0", "rank"} & set(vars(args))  # other programs' flags
    if foreign or args.data not in data.WORLDS or args.loss not in ipo.LOSSES:
        raise data.Refused("no run of ipo.py or lab/methods/losses.py in a world")
    world = ipo.WorldSource(args)
    world.ref = world.enumerate(model.load(folder / "ref.pt")[0])
    world.mu = world.ref.exp() if args.mu == "ref" else torch.full_like(world.ref, 1 / world.ref.shape[1])
    return args, world, world.enumerate(model.load(folder / "ckpt.pt")[0])


def expectation(args, world):
    """log pi (X,Y) -> (): the exact mean of the run's loss."""
    loss, length, ref = ipo.LOSSES[args.loss], torch.ones_like(world.ref), world.ref
    if args.loss == "robust":
        loss = functools.partial(loss, label_noise=args.label_noise)
    if args.loss == "simpo":
        loss, ref = functools.partial(loss, gamma=args.gamma), torch.zeros_like(ref)
    if args.logp == "mean":
        length = (world.pairs.start.diff() - world.pairs.prompt_len).view_as(ref)
    q = world.pstar + args.noise * (1 - 2 * world.pstar)
    certain, weights = torch.ones_like(q), exact.weights(world.mu)

    def mean(logp):
        h = exact.margins(logp / length, ref / length)
        if args.labels == "soft":
            return (weights * loss(h, q, args.tau)).sum((1, 2)).mean()
        return exact.expected(loss(h, certain, args.tau), q, world.mu)

    return mean


def answer(folder, steps):  # -> numbers by name
    """Of one run: its distance from its own minimiser, and where that lies."""
    args, world, trained = read(folder)
    mean = expectation(args, world)
    found = [exact.minimise(mean, start, steps) for start in (world.ref, trained)]
    values = torch.stack([mean(logp) for logp in found])
    best = found[values.argmin()]
    bounded = (best - world.ref).abs().max() < 100
    numbers = {
        "kl": data.kl(trained, best) if bounded else torch.tensor(torch.nan),
        "gap": mean(trained) - values.min(),
        "apart": values.max() - values.min(),
        "kl_ref": data.kl(best, world.ref),
        "h_max": exact.margins(best, world.ref).max(),
    }
    return data.finite(numbers)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", help="a run's each, or a folder of such folders")
    parser.add_argument("--out", default="out/minimiser", help="folder of report.json [out/minimiser]")
    parser.add_argument("--steps", type=int, default=500, help="of LBFGS, from each start [500]")
    args = parser.parse_args(argv)
    report = {}
    for folder in family.held(args.folders):
        try:
            report[folder.name] = answer(folder, args.steps)
        except (data.Refused, model.Refused, OSError, ValueError, KeyError, AttributeError) as error:
            print(f"{folder}: skipped: {error}")
            continue
        told = (f"{name} {ipo.show(value)}" for name, value in report[folder.name].items())
        print(f"{folder.name:16} {', '.join(told)}", flush=True)
    if not report:
        print(f"minimiser: {', '.join(args.folders)}: no finished run here", file=sys.stderr)
        return 2
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}/report.json").write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
