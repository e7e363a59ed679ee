"""Does a loss of token log-probs sum or average over tokens? This is no program; lab.identify uses it.

The loss takes log-probs (B,T) of chosen, rejected and the reference's of both, then the masks of chosen and
rejected, integers, 1 at the response's tokens. Prompt and padding have log-probs, too, so whoever reads them
is found out. A Kind makes one number of a row. It is the loss's own if random tokens, of several lengths and
widths, cost what responses of one token with the same numbers cost. It must be the only such kind. So the
loss is one of four numbers, and probe.py asks it.

Trap: some losses count only the tokens whose log-ratio is not 0. The first of each random response is 0.
"""
from itertools import product
from typing import Callable, NamedTuple

import torch
from torch.nn.functional import pad

from lab.identify import probe

SCORED = {  # which tokens count
    "": lambda mask: mask,
    ", prompt and padding, too": torch.ones_like,
    ", one token early": lambda mask: mask.roll(-1, -1),
    ", one token late": lambda mask: mask.roll(1, -1),
}
DIVIDED = {  # and what their sum is divided by
    "sum": lambda scored, ratio: 1,
    "mean": lambda scored, ratio: scored.sum(-1),
    "mean where the ratio is not 0": lambda scored, ratio: (scored * ratio != 0).sum(-1),
    "sum over the padded width": lambda scored, ratio: scored.shape[-1],
}
TWICE = "sum over the padded width, prompt and padding, too"  # that is the mean of all
SHAPES = [  # lengths of both responses, width of the batch
    ((4, 2), 8),
    ((2, 5), 9),
    ((3, 3), 12),
    ((6, 2), 10),
]
RATIOS = torch.tensor([  # margin 1.6 of sums, .55 of means
    [0.5, 0.25, 0.25, 0.0],
    [-0.2, -0.4, 0.0, 0.0],
])


class Kind(NamedTuple):
    name: str
    scored: Callable   # (T,) -> (T,)
    divided: Callable  # (T,), (n,T) -> (n,) or a number

    def number(self, x, ratio, mask):  # (n,T), (n,T), (T,) -> (n,)
        """What it makes of a row's log-probs x; ratio: policy's less the reference's."""
        scored = self.scored(mask)
        return (x * scored).sum(-1) / self.divided(scored, ratio)

    def tokens(self, number, mask):  # (1,), (T,) -> (1,T)
        """A row of equal log-probs that has this number."""
        scored = self.scored(mask)
        each = number * self.divided(scored, 1) / scored.sum()
        return each[:, None].expand(1, len(mask))


KINDS = [Kind(divided + scored, SCORED[scored], DIVIDED[divided])
         for scored, divided in product(SCORED, DIVIDED)
         if divided + scored != TWICE]


def masks(lengths, width):  # -> (2,T) a prompt of two tokens, the response, padding
    t = torch.arange(width) - 2
    return ((t >= 0) & (t < torch.tensor(lengths)[:, None])).long()


def of_numbers(token_loss, kind):
    """A loss of four numbers: what token_loss costs on responses of one token that have these numbers."""
    mask = masks((1, 1), 4)

    def loss(chosen, rejected, ref_chosen, ref_rejected):  # (1,) each
        numbers = chosen, rejected, ref_chosen, ref_rejected
        rows = [kind.tokens(number, mask[0]) for number in numbers]
        return token_loss(*rows, *mask[:, None])
    return loss


def draw(mask, scale):  # -> (4,n,T)
    """Random log-probs: chosen, rejected, reference's chosen and rejected; one ratio of a response is 0."""
    tokens = -1 - scale * torch.rand(4, 16, mask.shape[1], dtype=torch.float64)
    tokens[:2, :, 2] = tokens[2:, :, 2]
    return tokens


def difference(token_loss, kind):
    """How far the costs of random tokens are from those of their numbers, at most, over their spread."""
    worst = 0.0
    for (lengths, width), scale in product(SHAPES, (0.01, 1.0, 10.0)):
        mask = masks(lengths, width)
        tokens = draw(mask, scale)
        ratio = (tokens[:2] - tokens[2:]).repeat(2, 1, 1)
        twice = mask.repeat(2, 1)
        numbers = [kind.number(*row) for row in zip(tokens, ratio, twice)]
        costs = probe.values(lambda *rows: token_loss(*rows, *mask[:, None]), *tokens)
        same = probe.values(of_numbers(token_loss, kind), *numbers)
        off = (costs - same).abs().max() / (costs.max() - costs.min())
        worst = max(worst, off.item() if off.isfinite() else float("inf"))
    return worst


def find(token_loss):
    """The kind that fits best, and how far it is off; infinity if two fit."""
    torch.manual_seed(0)
    off = [difference(token_loss, kind) for kind in KINDS]
    best, second = sorted(off)[:2]
    kind = KINDS[off.index(best)]
    return kind, best if second > 1e-3 else float("inf")


def fixture(token_loss):
    """The loss where the log-ratios of chosen and rejected are RATIOS, after a prompt of two tokens."""
    mask = masks((4, 2), 7)
    reference = torch.full((2, 1, 7), -2.0)
    policy = reference + pad(RATIOS, (2, 1))[:, None]
    rows = *policy, *reference
    return probe.values(lambda *four: token_loss(*four, *mask[:, None]), *rows).item()
