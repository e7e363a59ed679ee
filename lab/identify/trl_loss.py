"""What does the installed TRL's DPOTrainer compute from token log-probs? No program; lab.identify uses it.

A stand-in takes the model's place in TRL's compute_loss. It returns the log-probs that are given, and 0
outside the response, as TRL's head does. test_identify.py lets two random GPT-2s go through TRL's own tokens,
collator, head and reference, and compares.

Trap: TRL reads its metrics out as Python numbers, which torch.vmap forbids, so meanwhile `item` gives 0.
"""
import tempfile
import warnings
from types import SimpleNamespace
from unittest import mock

import datasets
import tokenizers
import torch
import transformers
import trl

from data import Refused, short

WORDS = {"<eos>": 0, "p": 1, "a": 2, "b": 3, "c": 4, "d": 5}
PAIR = {"prompt": "p", "chosen": " a b c", "rejected": " d"}


def tokenizer():
    """One that splits at spaces."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "p"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def random_gpt2(seed):
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=8, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0)).eval()


class Given:
    """Stands for a model whose log-probs of tokens (R,T) are given."""

    def __init__(self, logp):
        self.logp = logp

    def __call__(self, labels, **more):
        scored = labels[:, 1:] != -100
        zero = torch.zeros(scored.shape)
        return SimpleNamespace(log_probs=self.logp * scored, entropy=zero, mean_logits=zero,
                               log_sum_sq_probs=zero, is_top1=zero > 0)


def trainer(loss_type):
    """TRL's, with two models and one pair. Raises Refused if TRL does not know the loss."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    pairs = datasets.Dataset.from_list([PAIR])
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = trl.DPOConfig(folder, loss_type=[loss_type], bf16=False, use_cpu=True, disable_tqdm=True,
                                 gradient_checkpointing=False, report_to="none")
            return trl.DPOTrainer(random_gpt2(0), random_gpt2(1), args, train_dataset=pairs,
                                  processing_class=tokenizer())
        except ValueError as error:
            raise Refused(f"--loss_type {loss_type}: {short(error)}") from None


def load(loss_type):
    """TRL's loss of token log-probs and masks, as tokens.py asks for it."""
    made = trainer(loss_type)

    def loss(chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, beta=made.beta):
        mask = torch.cat([chosen_mask, rejected_mask])
        mask = torch.nn.functional.pad(mask, (1, 0))  # nothing predicts the first token
        ones = torch.ones_like(mask)
        batch = {"input_ids": ones, "attention_mask": ones, "completion_mask": mask}
        made.beta = beta
        made.ref_model = Given(torch.cat([ref_chosen, ref_rejected]))
        with mock.patch.object(torch.Tensor, "item", lambda tensor: 0.0):
            return made.compute_loss(Given(torch.cat([chosen, rejected])), batch)
    return loss
