"""Which known loss of the margin is this one, and what does it optimise? No program; lab.identify uses it.

"ipo" is f(h) = (h - 1/(2 tau))^2 plus any constant, "ipo scaled" that times a factor. The others are a
factor times f(beta h). Slopes at h = 0, -50 and 50 give the numbers. A verdict needs that all values on h =
-50 .. 50 are then right to 1e-5. A negative tau or beta is a wrong sign. The minimiser in a world is exact
(lab/common/exact.py), and compared with pi* of eq. 7 for 61 taus from .01 to 10.

Trap: a loss of means over tokens has another minimiser than the same loss of sums. The lengths are those of
the world's responses.
"""

import torch
import torch.nn.functional as F

import data
from lab.common import exact
from lab.identify import probe

GRID = torch.arange(-2000, 2001, dtype=torch.float64) / 40
ZERO = len(GRID) // 2  # GRID[ZERO] is 0, exactly
KNOWN = {  # f(z), for z = beta h
    "dpo": lambda z: -F.logsigmoid(z),
    "hinge": lambda z: F.relu(1 - z),
    "squared hinge": lambda z: F.relu(1 - z) ** 2,
    "exponential": lambda z: torch.exp(-z),
    "savage": lambda z: torch.sigmoid(-z) ** 2,
}


def name_it(loss):
    """(verdict, tau or beta, factor) of a loss of the margin."""
    values, slope = loss(GRID), probe.slope(loss, GRID)
    guesses = [as_square(values, slope)]
    guesses += [as_known(f, name, values, slope) for name, f in KNOWN.items()]
    guesses.append(("none", None, None))
    return next(guess for guess in guesses if guess)


def as_square(values, slope):
    """name_it's answer if this is a square, up to a constant; None if it is not."""
    at_zero = slope[ZERO].item()
    factor = (slope[-1] - slope[0]).item() / 200
    if not at_zero or not factor > 1e-9 * abs(at_zero):
        return None
    asked = -at_zero / (2 * factor)
    square = factor * (GRID - asked) ** 2
    if not alike(values - values.min(), square - square.min(), factor):
        return None
    name = "ipo" if abs(factor - 1) < 1e-6 else "ipo scaled"
    return name, 1 / (2 * asked), factor


def as_known(f, name, values, slope):
    """name_it's answer if this is a factor times f(beta h); None if it is not."""
    zero = GRID[[ZERO]]
    factor = (values[ZERO] / f(zero)).item()
    if not abs(factor * slope[ZERO]) > 0:  # a nan is not
        return None
    beta = (slope[ZERO] / factor / probe.slope(f, zero)).item()
    curve = factor * f(beta * GRID)
    if not alike(values, curve, factor):
        return None
    return name, beta, factor


def alike(values, curve, unit):
    """Equal to 1e-5 of the curve at each point, and to 1e-5 of a unit where the curve is 0?"""
    return torch.allclose(values, curve, rtol=1e-5, atol=1e-5 * abs(unit))


def nearest(loss, of_means=False):
    """How far its exact minimiser in bt is from the nearest pi* of identity and of logit, in words.

    of_means: its margin is of means over tokens.
    """
    world = data.World("bt")
    ref = exact.of_base(world)
    mu = torch.full_like(ref, 1 / ref.shape[1])
    length = world.pairs.length - world.pairs.prompt_len
    each = length.view_as(ref) if of_means else 1

    def cost(logp):
        h = exact.margins(logp / each, ref / each)
        return exact.expected(loss(h), world.pstar, mu)

    best = exact.minimise(cost, ref, steps=300)
    found = {}
    for psi, worth in (("identity", world.pstar), ("logit", world.pstar.logit())):
        taus = torch.logspace(-2, 1, 61).tolist()
        optima = [data.optimum(ref, worth, mu, tau) for tau in taus]
        gaps = [data.kl(best, optimum).item() for optimum in optima]
        gap, tau = min(zip(gaps, taus))
        words = f"its minimiser in bt is {gap:z.4f} nats from that of tau {tau:.3g}"
        found[f"nearest pi* of {psi}"] = words
    return found


def examine(loss, tau):
    """All that can be said of a loss of the margin, by name. tau: what the caller named, or None."""
    zero = GRID[[ZERO]]
    slopes = probe.slope(loss, probe.WIDE)
    large = probe.WIDE[probe.WIDE.abs() < 1e4].float()
    on_large = loss(large) + probe.slope(loss, large)
    verdict, its_tau, factor = name_it(loss)
    ignored = torch.allclose(loss(GRID, 0.7), loss(GRID, 1.0))
    return {
        "verdict": verdict,
        "tau": its_tau,
        "factor": factor,
        "margin alone": probe.margin_only(loss),
        "value at h = 0": loss(zero).item(),
        "slope at h = 0": probe.slope(loss, zero).item(),
        "stops at": probe.turn(slopes, several=True),  # nan: a certain pair always asks for more
        "eq. 17 asks for": 1 / (2 * tau) if tau else None,
        "link": probe.name_link(slopes),
        "convex": bool((probe.slope(loss, GRID).diff() >= -1e-9).all()),
        "finite to |h| = 10,000": bool(on_large.isfinite().all()),  # in float32
        "takes p": "and ignores it" if loss.takes_p and ignored else loss.takes_p,
    }
