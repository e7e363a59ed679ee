"""How does one ask any loss for its values, slope, stop and link? The tool of lab/identify.py.

Each value comes from a batch of one pair, so that a mean over the batch hides nothing, through torch.vmap.
Answer: 17 losses of three signatures (four log-probs, h alone, h with p and tau), means included, read alike.
"""
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch


class Unusable(ValueError):
    """A loss that cannot be asked, in one line."""


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
        names = [name for name, parameter in inspect.signature(function).parameters.items()
                 if parameter.default is parameter.empty and name != keyword and parameter.kind < 2]
        self.takes_p = len(names) > 1 and names[1] == "p"
        self.logps = len(names) == 4
        if not self.logps and len(names) not in (1, 2, 3):
            raise Unusable(f"takes {len(names)} arguments ({', '.join(names)}); write (h,), (h, p, tau) or "
                           "the four log-probs of chosen, rejected, and the reference's of both")
        self.tau = value if len(names) == 3 else None

    def ask(self, *tensors):  # of one pair -> ()
        out = self.function(*tensors, **self.more)
        out = out[0] if isinstance(out, tuple) else out
        return out.sum()

    def __call__(self, h, p=1.0):
        def one(x):
            if self.logps:
                zero = torch.zeros_like(x)
                return self.ask(x[None], zero[None], zero[None], zero[None])
            if not self.takes_p:
                return self.ask(x[None])
            tau = [] if self.tau is None else [self.tau]
            return self.ask(x[None], torch.full_like(x[None], p), *tau)
        return torch.vmap(one)(h.flatten()).view(h.shape)


def tau_of(function, keyword, value):
    """The tau that the caller named, or the function's own default for it; None if there is none."""
    if value:
        return float(value)
    default = inspect.signature(function).parameters[keyword].default if keyword else None
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


def stop(loss):
    """Where a certain pair stops: the first zero of the slope, from below; None if it never stops."""
    h = torch.linspace(-1000, 1000, 40001, dtype=torch.float64)
    s = slope(loss, h)
    turns = torch.where((s[:-1] < -1e-100) & (s[1:] >= 0))[0]  # not what underflow made 0
    if len(turns) == 0:
        return None
    low, high = h[turns[0]], h[turns[0] + 1]
    return (low - s[turns[0]] * (high - low) / (s[turns[0] + 1] - s[turns[0]])).item()


def link(loss, p):
    """argmin over h of p f(h) + (1-p) f(-h), by its slope; nan if there is none on the grid."""
    h = torch.linspace(-300, 300, 60001, dtype=torch.float64)
    total = p * slope(loss, h) - (1 - p) * slope(loss, -h)
    turns = torch.where((total[:-1] < -1e-100) & (total[1:] >= 0))[0]
    return h[turns[0]].item() if len(turns) == 1 else float("nan")
