"""What does this loss optimise? Which IPO, if any, is yours?

`python -m lab.identify module:function` (or file.py:function) takes a loss of (chosen_logp, rejected_logp,
ref_chosen_logp, ref_rejected_logp), of (h,), or of (h, p, tau), all tensors, and asks it for values. Is it a
function of the margin h alone? Where does a certain pair stop? Is it (h - 1/(2 tau))^2, eq. 17, for some tau,
or a known other loss? What is its link, argmin over h of p f(h) + (1-p) f(-h) (Tang et al. 2024,
arXiv:2402.05749), and so the Psi whose optimum it aims at? Is it convex, finite for |h| up to 1e4, are soft
labels honoured, and how far is its exact minimiser in a world (lab/tabular.py) from the nearest pi*? `--tau
NAME[=VALUE]` names the keyword that carries tau.

Traps: a mean over the batch hides the pairs, so each value comes from a batch of one; a loss without
reference looks like one of the margin until the reference moves. What fits nothing is "none of these", with
its numbers.
Answer: (logits - 1/(2 beta))^2 on sums is IPO with tau = beta, largest difference 7e-13; log-sigmoid is DPO;
(beta h - 1/(2 beta))^2 asks for 50 nats at beta .1, where eq. 17 asks for 5.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from lab import askable, tabular

GRID = torch.arange(-2000, 2001, dtype=torch.float64) / 40  # 0 is in it, exactly
KNOWN = {  # name -> (f(z), its slope at z = 0): z = beta h, and beta is found from the slope at h = 0
    "dpo": (lambda z: -F.logsigmoid(z), -0.5),
    "hinge": (lambda z: F.relu(1 - z), -1.0),
    "squared hinge": (lambda z: F.relu(1 - z) ** 2, -2.0),
    "exponential": (lambda z: torch.exp(-z), -1.0),
    "savage": (lambda z: torch.sigmoid(-z) ** 2, -0.25),
}


def name_it(loss):
    """(verdict, tau or beta, factor, largest difference over h in -50 .. 50) of a loss of the margin."""
    values, s = loss(GRID), askable.slope(loss, GRID)
    start, at_zero = loss(torch.zeros(1).double()).item(), s[len(GRID) // 2].item()
    bend = (s[-1] - s[0]).item() / 100  # of a square: twice its factor
    if bend > 1e-9 and at_zero:
        asked = -at_zero / bend
        square = bend / 2 * (GRID - asked) ** 2
        off = (values - values.min() - square + square.min()).abs().max().item()
        if off <= 1e-4 * (1 + values.abs().max().item()):
            exact = abs(bend / 2 - 1) < 1e-6
            return "ipo" if exact else "ipo scaled", 1 / (2 * asked), bend / 2, off
    for name, (f, s0) in KNOWN.items():
        beta = at_zero / s0
        off = (values - f(beta * GRID)).abs().max().item() if beta else math.inf
        if off <= 1e-4 * (1 + values.abs().max().item()):
            return name, beta, 1.0, off
    return "none", None, None, None


def name_link(loss):
    """identity, logit, sign, or none, of the link at p = .6, .75, .9, .99."""
    p = torch.tensor([0.6, 0.75, 0.9, 0.99], dtype=torch.float64)
    v = torch.tensor([askable.link(loss, float(q)) for q in p], dtype=torch.float64)
    for name, psi in (("identity", 2 * p - 1), ("logit", p.logit()), ("sign", torch.ones_like(p))):
        ratio = v / psi
        if (ratio - ratio.mean()).abs().max() < 0.02 * ratio.mean().abs():
            return name
    return "none"


def nearest(loss, name):
    """Its exact minimiser in a world, and the nearest pi* of identity and of logit: {Psi: (tau, KL)}."""
    world = data.World(name)
    ref = (world.base + 1e-4).log().expand_as(world.reward).log_softmax(-1)
    mu = torch.full_like(ref, 1 / ref.shape[1])
    best = tabular.minimise(
        lambda logp: tabular.expected(loss(tabular.margins(logp, ref)), world.pstar, mu), ref, steps=300)
    found = {}
    for psi, worth in (("identity", world.pstar), ("logit", world.pstar.logit())):
        taus = torch.logspace(-2, 1, 61).tolist()
        gaps = [data.kl(best, data.optimum(ref, worth, mu, tau)).item() for tau in taus]
        gap, tau = min(zip(gaps, taus))
        found[psi] = {"tau": round(tau, 4), "kl": round(gap, 4) if math.isfinite(gap) else None}
    return found


def examine(loss, tau):
    """All answers, by name."""
    large = torch.tensor([-1e4, -1e3, -89.5, 0.0, 89.5, 1e3, 1e4])
    report = {"margin_only": askable.margin_only(loss), "value_at_0": loss(torch.zeros(1).double()).item(),
              "slope_at_0": askable.slope(loss, torch.zeros(1).double()).item()}
    report["sign"] = "right" if report["slope_at_0"] < 0 else "wrong: it pushes the chosen response down"
    report["verdict"], report["tau"], report["factor"], report["largest_difference"] = name_it(loss)
    report["stops_at"] = askable.stop(loss)  # None: a certain pair always asks for more
    report["asked_by_eq_17"] = 1 / (2 * tau) if tau else None  # at the tau that the caller named
    report["link"] = name_link(loss)
    s = askable.slope(loss, GRID)
    report["convex"] = bool((s.diff() >= -1e-9).all())
    for dtype in (torch.float32, torch.bfloat16):
        h = large.to(dtype)
        report[f"finite_{str(dtype)[6:]}"] = bool((loss(h) + askable.slope(loss, h)).isfinite().all())
    report["soft_labels"] = "no p" if not loss.takes_p else (
        "honoured" if not torch.allclose(loss(GRID, 0.7), loss(GRID, 1.0)) else "ignored")
    return report


def sentence(report):
    """The verdict in words."""
    verdict, tau, asked = report["verdict"], report["tau"], report["asked_by_eq_17"]
    if not report["margin_only"]:
        return "no function of the margin alone: neither IPO nor DPO (no reference, lengths, or more terms)"
    if verdict == "none":
        return "none of these: neither IPO nor DPO, hinge, exponential, Savage; its numbers:"
    if verdict.startswith("ipo"):
        text = f"this is IPO with tau = {tau:.4g}, times {report['factor']:.4g}: "
        text += f"it asks for {1 / (2 * tau):.4g} nats"
        return text + (f", eq. 17 at the tau named for {asked:.4g}" if asked else "")
    return f"this is {verdict} with beta = {tau:.4g}, not IPO: a certain pair stops at {report['stops_at']}"


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="identify", description=__doc__, formatter_class=raw)
    parser.add_argument("loss", help="module:function or file.py:function")
    parser.add_argument("--tau", default="", help="NAME or NAME=VALUE of the keyword that carries tau")
    parser.add_argument("--seed", type=int, default=0, help="of the log-probs that test for the margin [0]")
    parser.add_argument("--out", default="out/identify", help="folder of report.json [out/identify]")
    parser.add_argument("--json", action="store_true", help="print one object instead of the screen")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    keyword, _, value = args.tau.partition("=")
    try:
        function = askable.load(args.loss)
        loss = askable.Loss(function, keyword, float(value) if value else None)
        report = examine(loss, askable.tau_of(function, keyword, value))
        if report["margin_only"]:
            report["nearest"] = {world: nearest(loss, world) for world in ("bt", "deterministic")}
    except (askable.Unusable, ValueError, TypeError, RuntimeError) as error:
        print(f"identify: {args.loss}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}/report.json").write_text(json.dumps(report, indent=1))
    if args.json:
        print(json.dumps(report))
    else:
        print(sentence(report))
        for name, answer in report.items():
            print(f"{name:20} {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
