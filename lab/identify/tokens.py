"""Does a loss of token log-probs sum or average over tokens, and which does TRL's? No program.

The loss takes log-probs (B,T) of chosen, rejected and the reference's of both, then the masks of chosen and
rejected, integers, 1 at the response's tokens. Prompt and padding have log-probs, too, so whoever reads them
is found out. A Kind makes one number of a row. It is the loss's own if random tokens, of several lengths and
widths, cost what responses of one token with the same numbers cost. It must be the only such kind. So the
loss is one of four numbers, and margin.py asks it.

`of_trl` makes such a loss of the installed TRL's DPOTrainer. A stand-in takes the model's place in TRL's
compute_loss. It returns the log-probs that are given, and 0 outside the response, as TRL's head does.
test_identify.py lets two random GPT-2s go through TRL's own tokens, collator, head and reference, and
compares. TRL and what it needs are imported there alone.

Trap: some losses count only the tokens whose log-ratio is not 0. The first of each random response is 0.
And TRL reads its metrics out as Python numbers, which torch.vmap forbids, so meanwhile `item` gives 0.
"""
import tempfile
import warnings
from itertools import product
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest import mock

import torch

from data import Refused, short
from lab.identify import margin

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
}
FITS = 1e-3  # a kind that is off by less is the loss's own
# lengths of both responses, width of the batch
SHAPES = [((4, 2), 8), ((2, 5), 9),
          ((3, 3), 12), ((6, 2), 10)]
WORDS = {"<eos>": 0, "p": 1, "a": 2, "b": 3, "c": 4, "d": 5}
PAIR = {"prompt": "p", "chosen": " a b c", "rejected": " d"}


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
         for scored, divided in product(SCORED, DIVIDED)]


def masks(lengths, width):  # -> (2,T) a prompt of two tokens, the response, padding
    t = torch.arange(width) - 2
    return ((t >= 0) & (t < torch.tensor(lengths)[:, None])).long()


def of_numbers(token_loss, kind):
    """A loss of four numbers: what token_loss costs on responses of one token that have these numbers."""
    mask = masks((1, 1), 4)

    def loss(chosen, rejected, ref_chosen, ref_rejected):  # (1,) each
        rows = [kind.tokens(number, mask[0]) for number in (chosen, rejected, ref_chosen, ref_rejected)]
        return token_loss(*rows, *mask[:, None])
    return loss


def difference(token_loss, kind):
    """How far the costs of random tokens are from those of their numbers, at most, over their spread."""
    worst = 0.0
    for (lengths, width), scale in product(SHAPES, (0.01, 1.0, 10.0)):
        mask = masks(lengths, width)
        # (4,16,T) log-probs of chosen, rejected and the reference's of both; one ratio of a response is 0
        tokens = -1 - scale * torch.rand(4, 16, width, dtype=torch.float64)
        tokens[:2, :, 2] = tokens[2:, :, 2]
        ratio = (tokens[:2] - tokens[2:]).repeat(2, 1, 1)
        numbers = [kind.number(*row) for row in zip(tokens, ratio, mask.repeat(2, 1))]
        costs = margin.values(lambda *rows: token_loss(*rows, *mask[:, None]), *tokens)
        same = margin.values(of_numbers(token_loss, kind), *numbers)
        off = (costs - same).abs().max() / (costs.max() - costs.min())
        worst = max(worst, off.item() if off.isfinite() else float("inf"))
    return worst


def find(token_loss):
    """The kind that fits best, and how far it is off; infinity if two fit."""
    torch.manual_seed(0)
    off = [difference(token_loss, kind) for kind in KINDS]
    best, second = sorted(off)[:2]
    kind = KINDS[off.index(best)]
    return kind, best if second > FITS else float("inf")


def random_gpt2(seed):
    import transformers
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=8, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0)).eval()


def given(logp):  # (R,T)
    """Stands for a model that has these log-probs of tokens."""
    def model(labels, **more):
        scored = labels[:, 1:] != -100
        zero = torch.zeros(scored.shape)
        return SimpleNamespace(log_probs=logp * scored, entropy=zero, mean_logits=zero,
                               log_sum_sq_probs=zero, is_top1=zero > 0)
    return model


def trainer(loss_type):
    """TRL's, with two models and one pair. Raises Refused if TRL does not know the loss."""
    import datasets
    import tokenizers
    import transformers
    import trl
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    splits = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "p"))
    splits.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splits, eos_token="<eos>", pad_token="<eos>")
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = trl.DPOConfig(folder, loss_type=[loss_type], bf16=False, use_cpu=True, report_to="none")
            return trl.DPOTrainer(random_gpt2(0), random_gpt2(1), args, processing_class=tokenizer,
                                  train_dataset=datasets.Dataset.from_list([PAIR]))
        except ValueError as error:
            raise Refused(f"--loss_type {loss_type}: {short(error)}") from None


def of_trl(loss_type):
    """TRL's loss of token log-probs and masks, as `find` asks for it."""
    made = trainer(loss_type)

    def loss(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta=made.beta):
        mask = torch.cat([chosen_mask, rejected_mask])
        mask = torch.nn.functional.pad(mask, (1, 0))  # nothing predicts the first token
        ones = torch.ones_like(mask)
        batch = {"input_ids": ones, "attention_mask": ones, "completion_mask": mask}
        made.beta = beta
        made.ref_model = given(torch.cat([ref_chosen, ref_rejected]))
        with mock.patch.object(torch.Tensor, "item", lambda tensor: 0.0):
            return made.compute_loss(given(torch.cat([chosen, rejected])), batch)
    return loss
