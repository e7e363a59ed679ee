"""How does one ask any loss for its values, slope, stop and link? This is no program; lab.identify uses it.

Each value comes from a batch of one pair, through torch.vmap, so that a mean over the batch hides nothing.
"""
import importlib
import inspect
import runpy
import sys

import torch

from data import Refused, short

WIDE = (torch.arange(-30_000, 30_001).double() / 2000).sinh()  # h from -1.6e6 to 1.6e6, closest at 0


def load(spec):
    """The function that module:function or file.py:function names. Raises Refused."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise Refused("name a loss as module:function or file.py:function, or ask --trl for TRL's")
    try:
        if place.endswith(".py"):
            function = runpy.run_path(place)[name]
        else:
            sys.path.insert(0, "")
            function = getattr(importlib.import_module(place), name)
        needed(function)
        return function
    except Exception as error:  # whatever their module raises
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
            return out.sum()
        except Exception as error:  # whatever their function raises
            if "vmap" in str(error):
                error = "it makes a number of a tensor (.item(), or an `if`); use tensors alone"
            raise Refused(f"the loss cannot be computed: {short(error)}") from None
    return torch.vmap(one)(*columns)


class Loss:
    """loss(h, p) -> its values, in the shape of h. Raises Refused if the function takes something else."""

    def __init__(self, function):
        self.function = function
        self.names = needed(function)
        self.takes_p = self.names[1:] == ["p"]
        if len(self.names) not in (1, 4) and not self.takes_p:
            raise Refused(f"its arguments without a default are ({', '.join(self.names)}), not (h), (h, p) "
                          "or four log-probs; --tau NAME=VALUE gives one a value; or is it for --tokens?")

    def __call__(self, h, p=1.0):
        x = h.flatten()
        zero = torch.zeros_like(x)
        columns = [x, zero + p][:len(self.names)]
        if len(self.names) == 4:
            columns = [x / 2, -x / 2, zero, zero]
        return values(self.function, *columns).view(h.shape)


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
    falls, rises = slopes < -1e-100, slopes >= 0  # underflow leaves slopes of -1e-300
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
