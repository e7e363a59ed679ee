"""Which known loss of the margin is this one, and what does it optimise? No program; lab.identify uses it.

Each value comes from a batch of one pair, through torch.vmap, so that a mean over the batch hides nothing.
"ipo" is f(h) = (h - 1/(2 tau))^2 plus any constant, "ipo scaled" that times a factor. The others are a
factor times f(beta h). Slopes at h = 0, -50 and 50 give the numbers. A verdict needs that all values on h =
-50 .. 50 are then right to 1e-5. A negative tau or beta is a wrong sign.

Trap: a loss without a reference looks like one of the margin until the reference moves, so it is moved.
"""
import importlib
import inspect
import runpy

import torch
import torch.nn.functional as F

from data import Refused, short

WIDE = (torch.arange(-30_000, 30_001).double() / 2000).sinh()  # h from -1.6e6 to 1.6e6, closest at 0
GRID = torch.arange(-2000, 2001, dtype=torch.float64) / 40
ZERO = len(GRID) // 2  # GRID[ZERO] is 0, exactly
AT_ZERO = GRID[[ZERO]]
KNOWN = {  # f(z), for z = beta h
    "dpo": lambda z: -F.logsigmoid(z),
    "hinge": lambda z: F.relu(1 - z),
    "squared hinge": lambda z: F.relu(1 - z) ** 2,
}


def load(spec):
    """The function that module:function or file.py:function names. Raises Refused."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise Refused("name a loss as module:function or file.py:function, or ask --trl for TRL's")
    try:
        if place.endswith(".py"):
            function = runpy.run_path(place)[name]
        else:
            function = getattr(importlib.import_module(place), name)
        needed(function)
        return function
    except (Exception, SystemExit) as error:  # whatever their module raises
        raise Refused(f"{short(spec)} cannot be used ({type(error).__name__}: {short(error)}); write "
                      "module:function or file.py:function") from None


def parameters(function):
    """Its parameters by name; those of what it wraps if it is a decorator's (*args, **more)."""
    own = inspect.signature(function, follow_wrapped=False).parameters
    if all(parameter.kind > parameter.POSITIONAL_OR_KEYWORD for parameter in own.values()):
        own = inspect.signature(function).parameters
    return own


def needed(function):
    """Names of the positional arguments that have no default."""
    return [name for name, parameter in parameters(function).items()
            if parameter.default is parameter.empty and parameter.kind <= parameter.POSITIONAL_OR_KEYWORD]


def values(function, *columns):  # (n,...) each -> (n,)
    """The function's value at each of n pairs; of a tuple its first element. Raises Refused."""
    def one(*pair):
        try:
            out = function(*[x[None] for x in pair])
            out = out[0] if isinstance(out, (tuple, list)) else out
            return out.sum().double()  # it may compute in float32
        except (Exception, SystemExit) as error:  # whatever their function raises
            if "vmap" in str(error):
                error = "it makes a number of a tensor (.item(), or an `if`); use tensors alone"
            raise Refused(f"the loss cannot be computed: {short(error)}; mend it, it gets one pair") from None
    return torch.vmap(one)(*columns)


class Loss:
    """loss(h, p) -> its values; h (n,), p a number. Raises Refused if the function takes something else."""

    def __init__(self, function):
        self.function = function
        self.names = needed(function)
        self.takes_p = self.names[1:] == ["p"]
        if len(self.names) not in (1, 4) and not self.takes_p:
            raise Refused(f"its arguments without a default are ({', '.join(self.names)}), not (h), (h, p) "
                          "or four log-probs; --tau NAME=VALUE gives one a value; or is it for --tokens?")

    def __call__(self, h, p=1.0):
        zero = torch.zeros_like(h)
        columns = [h, zero + p][:len(self.names)]
        if len(self.names) == 4:
            columns = [h / 2, -h / 2, zero, zero]
        return values(self.function, *columns)


def slope(loss, h):  # (n,) -> (n,)
    h = h.clone().requires_grad_()
    return torch.autograd.grad(loss(h).sum(), h)[0]


def margin_only(loss):
    """Does it cost the same at all log-probs that have the same h?"""
    if len(loss.names) < 4:
        return True
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 64, dtype=torch.float64, generator=random)
    h = numbers[3]
    chosen, ref_chosen, ref_rejected = 5 * numbers[:3]
    rejected = chosen - ref_chosen + ref_rejected - h
    moved = values(loss.function, chosen, rejected, ref_chosen, ref_rejected)
    return torch.allclose(moved, loss(h), atol=1e-6)


def turn(slopes, several=False):  # of WIDE
    """The h where a slope first goes from below 0 to 0 or above; nan if none, or many and not several."""
    falls, rises = slopes < -1e-30, slopes >= 0  # underflow leaves -1e-300, or -1e-45 in float32
    at = torch.where(falls[:-1] & rises[1:])[0]
    if len(at) == 0 or len(at) > 1 and not several:
        return float("nan")
    low, high = at[0], at[0] + 1
    share = slopes[low] / (slopes[low] - slopes[high])
    return (WIDE[low] + share * (WIDE[high] - WIDE[low])).item()


def name_link(slopes):  # of WIDE
    """identity, logit, sign or none: argmin over h of p f(h) + (1-p) f(-h), as p goes, up to a factor."""
    p = torch.tensor([0.6, 0.75, 0.9, 0.99], dtype=torch.float64)
    mirrored = slopes.flip(0)
    best = torch.tensor([turn(q * slopes - (1 - q) * mirrored) for q in p])
    known = {"identity": 2 * p - 1, "logit": p.logit(), "sign": torch.ones_like(p)}
    for name, psi in known.items():
        ratio = best / psi
        spread = (ratio - ratio.mean()).abs().max()
        if spread < 1e-3 * ratio.mean().abs():
            return name
    return "none"


def name_it(loss):
    """(verdict, tau or beta, factor) of a loss of the margin."""
    costs, slopes = loss(GRID), slope(loss, GRID)
    known = [as_known(f, name, costs, slopes) for name, f in KNOWN.items()]
    return as_square(costs, slopes) or next(filter(None, known), ("none", None, None))


def as_square(costs, slopes):
    """name_it's answer if this is a square, up to a constant; None if it is not."""
    at_zero = slopes[ZERO].item()
    factor = (slopes[-1] - slopes[0]).item() / 200
    if not at_zero or not factor > 1e-9 * abs(at_zero):
        return None
    asked = -at_zero / (2 * factor)
    square = factor * (GRID - asked) ** 2
    if not alike(costs - costs.min(), square - square.min(), factor):
        return None
    name = "ipo" if abs(factor - 1) < 1e-6 else "ipo scaled"
    return name, 1 / (2 * asked), factor


def as_known(f, name, costs, slopes):
    """name_it's answer if this is a factor times f(beta h); None if it is not."""
    factor = (costs[ZERO] / f(AT_ZERO)).item()
    if not abs(factor * slopes[ZERO]) > 0:  # a nan is not
        return None
    beta = (slopes[ZERO] / factor / slope(f, AT_ZERO)).item()
    if not alike(costs, factor * f(beta * GRID), factor):
        return None
    return name, beta, factor


def alike(costs, curve, unit):
    """Equal to 1e-5 of the curve at each point, and to 1e-5 of a unit where the curve is 0?"""
    return torch.allclose(costs, curve, rtol=1e-5, atol=1e-5 * abs(unit))


def examine(loss, tau):
    """All that can be said of a loss of the margin, by name. tau: what the caller named, or None."""
    slopes = slope(loss, WIDE)
    verdict, its_tau, factor = name_it(loss)
    ignored = torch.allclose(loss(GRID, 0.7), loss(GRID, 1.0))
    return {
        "verdict": verdict,
        "tau": its_tau,
        "factor": factor,
        "margin alone": margin_only(loss),
        "value at h = 0": loss(AT_ZERO).item(),
        "slope at h = 0": slope(loss, AT_ZERO).item(),
        "stops at": turn(slopes, several=True),  # nan: a certain pair always asks for more
        "eq. 17 asks for": 1 / (2 * tau) if tau else None,
        "link": name_link(slopes),
        "takes p": "and ignores it" if loss.takes_p and ignored else loss.takes_p,
    }
