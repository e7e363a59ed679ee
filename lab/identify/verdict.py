"""Which known loss of the margin is this one, and what does it optimise? The tool of lab/identify/identify.py.

Verdicts: ipo is f(h) = (h - 1/(2 tau))^2 plus any constant, ipo scaled that times a factor; the others are a
factor times f(beta h). Slopes at h = 0, -50 and 50 give the numbers; a verdict needs that all values on h =
-50 .. 50 are then right to 1e-5. A negative tau or beta is a wrong sign. The minimiser in a world is exact
(lab/common/exact.py), and compared with pi* of eq. 7 for 61 taus from .01 to 10.

Trap: a loss of means over tokens has another minimiser than the same loss of sums: the lengths are those of
the world's responses.
Answer: in bt, IPO's minimiser is pi* of the identity to 1e-4 nats, DPO's that of logit.
"""
import math

import torch
import torch.nn.functional as F

import data
from lab.common import exact
from lab.identify import askable

GRID = torch.arange(-2000, 2001, dtype=torch.float64) / 40  # 0 is in it, exactly
KNOWN = {  # name -> f(z) and its slope at z = 0, for z = beta h
    "dpo": (lambda z: -F.logsigmoid(z), -0.5),
    "hinge": (lambda z: F.relu(1 - z), -1.0),
    "squared hinge": (lambda z: F.relu(1 - z) ** 2, -2.0),
    "exponential": (lambda z: torch.exp(-z), -1.0),
    "savage": (lambda z: torch.sigmoid(-z) ** 2, -0.25),
}


def name_it(loss):
    """(verdict, tau or beta, factor, largest difference over h in -50 .. 50) of a loss of the margin."""
    values, slope = loss(GRID), askable.slope(loss, GRID)
    at_zero, slope_at_zero = values[len(GRID) // 2].item(), slope[len(GRID) // 2].item()
    bend = (slope[-1] - slope[0]).item() / 100  # of a square: twice its factor
    if slope_at_zero and bend > 1e-9 * abs(slope_at_zero):
        asked = -slope_at_zero / bend
        square = bend / 2 * (GRID - asked) ** 2
        square, above = square - square.min(), values - values.min()
        if fits(above, square, bend / 2):
            exact = abs(bend / 2 - 1) < 1e-6
            return "ipo" if exact else "ipo scaled", 1 / (2 * asked), bend / 2, largest(above, square)
    for name, (f, slope_of_f) in KNOWN.items():
        f_at_zero = f(GRID[len(GRID) // 2]).item()
        factor = at_zero / f_at_zero
        beta = slope_at_zero / slope_of_f / factor if factor else 0.0
        curve = factor * f(beta * GRID)
        if beta and fits(values, curve, at_zero):
            return name, beta, factor, largest(values, curve)
    return "none", None, None, None


def largest(values, curve):
    return (values - curve).abs().max().item()


def fits(values, curve, unit):
    """Equal up to 1e-5 of the curve at each point, plus of a unit where it is 0?"""
    return bool(((values - curve).abs() <= 1e-5 * (curve.abs() + abs(unit))).all())


def nearest(loss, name, mean=False):
    """Its exact minimiser in a world, and the nearest pi* of identity and of logit: {Psi: (tau, KL)}. mean:
    its margin is of means over tokens."""
    world = data.World(name)
    ref = (world.base + 1e-4).log().expand_as(world.reward).log_softmax(-1)
    mu = torch.full_like(ref, 1 / ref.shape[1])
    length = (world.pairs.start.diff() - world.pairs.prompt_len).view_as(ref) if mean else 1

    def cost(logp):
        h = exact.margins(logp / length, ref / length)
        return exact.expected(loss(h), world.pstar, mu)

    best = exact.minimise(cost, ref, steps=300)
    found = {}
    for psi, worth in (("identity", world.pstar), ("logit", world.pstar.logit())):
        taus = torch.logspace(-2, 1, 61).tolist()
        asked = data.optimum(ref, worth, mu, 1.0) - ref  # / tau: what eq. 7 adds to ref, up to a constant
        gaps = [data.kl(best, (ref + asked / tau).log_softmax(-1)).item() for tau in taus]
        gap, tau = min(zip(gaps, taus))
        found[psi] = {"tau": round(tau, 4), "kl": round(max(gap, 0.0), 4) if math.isfinite(gap) else None}
    return found


def examine(loss, tau):
    """All answers, by name."""
    large = torch.tensor([-1e4, -1e3, -89.5, 0.0, 89.5, 1e3, 1e4])
    report = {"margin_only": askable.margin_only(loss), "value_at_0": loss(torch.zeros(1).double()).item(),
              "slope_at_0": askable.slope(loss, torch.zeros(1).double()).item()}
    report["sign"] = sign(report["slope_at_0"])
    report["verdict"], report["tau"], report["factor"], report["largest_difference"] = name_it(loss)
    report["stops_at"] = askable.stop(loss)  # None: a certain pair always asks for more
    report["asked_by_eq_17"] = 1 / (2 * tau) if tau else None  # at the tau that the caller named
    report["link"] = askable.name_link(loss)
    s = askable.slope(loss, GRID)
    report["convex"] = bool((s.diff() >= -1e-9).all())
    for dtype in (torch.float32, torch.bfloat16):
        h = large.to(dtype)
        report[f"finite_{str(dtype)[6:]}"] = bool((loss(h) + askable.slope(loss, h)).isfinite().all())
    report["soft_labels"] = "no p" if not loss.takes_p else (
        "honoured" if not torch.allclose(loss(GRID, 0.7), loss(GRID, 1.0)) else "ignored")
    return report


def sign(slope):
    """Of the slope at h = 0, in words."""
    if math.isnan(slope):
        return "unknown: not a number where training starts"
    return "right" if slope < 0 else "wrong: it pushes the chosen response down" if slope else "none: flat"
