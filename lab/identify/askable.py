"""How does one ask any loss for its values, slope, stop and link? The tool of lab/identify/identify.py.

Each value comes from a batch of one pair, so that a mean over the batch hides nothing, through torch.vmap.
Answer: losses of three signatures (four log-probs, h alone, h with p and tau), means included, read alike.
"""
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch


class Unusable(ValueError):
    """A loss that cannot be asked, in one line."""


def ask(function, *tensors, **more):  # of one pair -> ()
    """The function's value; of a tuple its first."""
    try:
        out = function(*tensors, **more)
    except Exception as error:  # whatever their function raises
        raise Unusable(f"raises {type(error).__name__}: {error}") from None
    out = out[0] if isinstance(out, (tuple, list)) else out
    return out.sum()


def needed(function, keyword):
    """Names of the arguments that have no default, but for the keyword's."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters
    if all(parameter.kind > 1 for parameter in parameters.values()):  # (*args, **more): a decorator's
        parameters = inspect.signature(function).parameters
    return [name for name, parameter in parameters.items()
            if parameter.default is parameter.empty and name != keyword and parameter.kind < 2]


def load(spec):
    """The function that module:function or file.py:function names."""
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            module_spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(place)
        return getattr(module, name)
    except Exception as error:  # whatever their module raises
        raise Unusable(f"cannot be imported ({error}); write module:function or file.py:function") from None


class Loss:
    """loss(h, p) -> values of the same shape, whatever the function takes; each from a batch of one pair."""

    def __init__(self, function, keyword, value):
        self.function, self.more = function, {keyword: value} if value is not None and keyword else {}
        names = needed(function, keyword)
        self.takes_p = len(names) > 1 and names[1] == "p"
        self.logps = len(names) == 4
        if not self.logps and len(names) not in (1, 2, 3):
            raise Unusable(f"takes {len(names)} arguments ({', '.join(names)}); write (h,), (h, p, tau) or "
                           "the four log-probs of chosen, rejected, and the reference's of both")
        self.tau = value if len(names) == 3 else None

    def ask(self, *tensors):  # of one pair -> ()
        return ask(self.function, *tensors, **self.more)

    def __call__(self, h, p=1.0):
        def one(x):
            if self.logps:
                half, zero = x[None] / 2, torch.zeros_like(x)[None]
                return self.ask(half, -half, zero, zero)
            if not self.takes_p:
                return self.ask(x[None])
            tau = [] if self.tau is None else [self.tau]
            return self.ask(x[None], torch.full_like(x[None], p), *tau)
        return torch.vmap(one)(h.flatten()).view(h.shape)


def tau_of(function, keyword, value):
    """The tau that the caller named, or the function's own default for it; None if there is none."""
    if value:
        return float(value)
    parameters = inspect.signature(function).parameters
    if keyword and keyword not in parameters:
        raise Unusable(f"--tau {keyword}: it has no such argument; it has {', '.join(parameters)}")
    default = parameters[keyword].default if keyword else None
    return default if isinstance(default, (int, float)) else None


def slope(loss, h):  # (n,) -> (n,)
    h = h.clone().requires_grad_()
    return torch.autograd.grad(loss(h).sum(), h)[0]


def margin_only(loss):
    """The same for all log-probs with the same h?"""
    if not loss.logps:
        return True
    move, h = torch.randn(4, 64, dtype=torch.float64).split([3, 1])
    chosen, ref_chosen, ref_rejected = 5 * move
    rejected = chosen - ref_chosen + ref_rejected - h[0]
    moved = torch.vmap(lambda *x: loss.ask(*(y[None] for y in x)))(chosen, rejected, ref_chosen, ref_rejected)
    return torch.allclose(moved, loss(h[0]), atol=1e-6)


def turns(slope_of, h):
    """Where a slope goes from below 0 (not from what underflow leaves) to 0 or above: indices into h."""
    s = slope_of(h)
    return torch.where((s[:-1] < -1e-100) & (s[1:] >= 0))[0]


def turn(slope_of, several):
    """The first turn over h = -1.6e6 .. 1.6e6, to 1e-5 of itself; None: none, or many and not several."""
    h = torch.sinh(torch.linspace(-15, 15, 3001, dtype=torch.float64))
    found = turns(slope_of, h)
    if len(found) == 0 or len(found) > 1 and not several:
        return None
    fine = torch.linspace(h[found[0]], h[found[0] + 1], 1001, dtype=torch.float64)
    at = turns(slope_of, fine)[0]
    low, high = fine[at], fine[at + 1]
    below, above = slope_of(fine[at:at + 2])
    return (low - below * (high - low) / (above - below)).item()


def stop(loss):
    """Where a certain pair stops: the first zero of the slope, from below; None if it never stops."""
    return turn(lambda h: slope(loss, h), several=True)


def link(loss, p):
    """argmin over h of p f(h) + (1-p) f(-h), by its slope; nan if there is none, or more than one."""
    found = turn(lambda h: p * slope(loss, h) - (1 - p) * slope(loss, -h), several=False)
    return float("nan") if found is None else found


def name_link(loss):
    """identity, logit, sign, or none, of the link at p = .6, .75, .9, .99."""
    p = torch.tensor([0.6, 0.75, 0.9, 0.99], dtype=torch.float64)
    v = torch.tensor([link(loss, float(q)) for q in p], dtype=torch.float64)
    for name, psi in (("identity", 2 * p - 1), ("logit", p.logit()), ("sign", torch.ones_like(p))):
        ratio = v / psi
        if (ratio - ratio.mean()).abs().max() < 1e-3 * ratio.mean().abs():
            return name
    return "none"
