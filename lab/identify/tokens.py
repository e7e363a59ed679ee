"""Does a loss of token log-probs sum or average over tokens? The tool of lab/identify/identify.py --tokens and --trl.

The loss takes log-probs (B,T) of chosen, rejected and the reference's of both, then the masks of chosen and
rejected, integers, 1 at the response's tokens. Prompt and padding have log-probs, too: whoever reads them is
found out. A KIND makes one number of a row. It is the loss's own if random tokens, of several lengths and
widths, cost what responses of one token with the same numbers cost; it must be the only such kind. So the
loss is one of four numbers, and lab/identify/askable.py asks it.

Trap: some losses count only the tokens whose log-ratio is not 0; the first of each random response is 0.
Answer: 4 ways to choose tokens, 4 divisors, 15 kinds; one of them fits, or "none of these" with weights.
"""
from dataclasses import dataclass
from typing import Callable

import torch

from lab.identify import askable

RATIOS = [0.5, 0.25, 0.25, 0.0], [-0.2, -0.4]  # of chosen and rejected: margin 1.6 of sums, .55 of means
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
    "sum over the padded width": lambda scored, ratio: torch.ones_like(scored).sum(-1),
}


@dataclass
class Kind:
    name: str
    scored: Callable   # (T,) -> (T,)
    divided: Callable  # (T,), (n,T) -> (n,), () or 1

    def number(self, x, ratio, mask):  # (n,T), (n,T), (T,) -> (n,)
        """What it makes of a row's log-probs x; ratio: policy's less the reference's."""
        scored = self.scored(mask)
        return (x * scored).sum(-1) / self.divided(scored, ratio)

    def tokens(self, number, mask):  # (1,), (T,) -> (1,T)
        """A row of equal log-probs that has this number."""
        scored = self.scored(mask)
        each = number * self.divided(scored, torch.ones_like(scored)) / scored.sum()
        return each[:, None].expand(1, len(mask))


KINDS = [Kind(divided + scored, SCORED[scored], DIVIDED[divided]) for scored in SCORED for divided in DIVIDED]
TWICE = "sum over the padded width, prompt and padding, too"  # that is their mean
KINDS = [kind for kind in KINDS if kind.name != TWICE]


def masks(lengths, width):  # -> (2,T) a prompt of two tokens, the response, padding
    at = torch.arange(width)
    return torch.stack([(at >= 2) & (at < 2 + length) for length in lengths]).long()


class OfNumbers:
    """A loss of four numbers: token_loss of responses of one token that have them, if it is of this kind."""

    def __init__(self, token_loss, more, kind):
        self.token_loss, self.more, self.kind = token_loss, more, kind
        self.masks = masks((1, 1), 4)

    def __call__(self, c, r, rc, rr):  # (1,) each
        rows = [self.kind.tokens(number, self.masks[i % 2]) for i, number in enumerate((c, r, rc, rr))]
        return self.token_loss(*rows, *self.masks[:, None], **self.more)


def value(token_loss, rows, mask, more):  # four of (T,), (2,T) -> ()
    return askable.ask(token_loss, *(row[None] for row in rows), *mask[:, None], **more)


def draw(mask, scale):  # -> (4,n,T)
    """Random log-probs: chosen, rejected, reference's chosen and rejected; one ratio of a response is 0."""
    tokens = -1 - scale * torch.rand(4, 16, mask.shape[1], dtype=torch.float64)
    tokens[:2, :, 2] = tokens[2:, :, 2]
    return tokens


def difference(token_loss, kind, more):
    """How far the costs of random tokens are from those of their numbers, at most, over their spread."""
    of_numbers, worst = OfNumbers(token_loss, more, kind), 0.0
    for lengths, width in (((4, 2), 8), ((2, 5), 9), ((3, 3), 12), ((6, 2), 10)):
        for scale in (0.01, 1.0, 10.0):
            mask = masks(lengths, width)
            tokens = draw(mask, scale)
            ratio = (tokens[:2] - tokens[2:]).repeat(2, 1, 1)
            numbers = [kind.number(tokens[i], ratio[i], mask[i % 2]) for i in range(4)]
            costs = torch.vmap(lambda *rows: value(token_loss, rows, mask, more))(*tokens)
            same = torch.vmap(lambda *four: askable.ask(of_numbers, *(x[None] for x in four)))(*numbers)
            off = (costs - same).abs().max() / (costs.max() - costs.min())
            worst = max(worst, off.item() if off.isfinite() else float("inf"))
    return worst


def find(token_loss, more):
    """The one kind that fits, or None; all differences by name."""
    off = {kind.name: difference(token_loss, kind, more) for kind in KINDS}
    fit = [kind for kind in KINDS if off[kind.name] < 1e-3]
    return fit[0] if len(fit) == 1 else None, off


def fixture(token_loss, more):
    """The loss at RATIOS, and its slope in each token of chosen and rejected over the largest."""
    mask = masks((4, 2), 7)
    reference = torch.full((2, 7), -2.0, dtype=torch.float64)
    policy = reference + 0.7 * (1 - mask)  # prompt and padding have moved, too
    for row, ratios in zip(policy, RATIOS):
        row[2:2 + len(ratios)] += torch.tensor(ratios, dtype=torch.float64)
    policy.requires_grad_()
    loss = value(token_loss, (*policy, *reference), mask, more)
    slope = torch.autograd.grad(loss, policy)[0]
    return loss.item(), (slope / slope.abs().max() + 0.0).tolist()  # + 0: no -0


def check(function, keyword):
    """Raises Unusable unless it takes six arguments beside the keyword's."""
    names = askable.needed(function, keyword)
    if len(names) != 6:
        raise askable.Unusable(f"takes {len(names)} arguments ({', '.join(names)}); --tokens needs six: "
                               "log-probs (B,T) of chosen, rejected, the reference's of both, masks of both")
