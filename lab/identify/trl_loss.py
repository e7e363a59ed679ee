"""What does the installed TRL's DPOTrainer compute from token log-probs? The tool of lab/identify/identify.py --trl.

A trainer with two hand-made GPT-2s that read positions alone: the log-probs at a position are a table, so
that the fixture of lab/identify/tokens.py has its log-ratios through TRL's own tokens, collator, head and reference.
For all other log-probs a stand-in takes the model's place: it returns what is given, and 0 outside the
response, as TRL's head does. At the fixture both ways must cost the same.

Traps: TRL reads its metrics out as Python numbers, which torch.vmap forbids, so meanwhile `item` gives 0; TRL
adds the end-of-text token to both responses.
Answer: TRL 1.16's ipo costs 19.8025 at the fixture (mean over tokens), its sigmoid .616344 (sum).
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

from lab.identify import tokens
from lab.identify.askable import Unusable

WORDS = {"<eos>": 0, "p": 1, "a": 2, "b": 3, "c": 4, "d": 5}
PAIR = {"prompt": "p", "chosen": " a b c", "rejected": " d"}
RESPONSES = ["a", "b", "c", "<eos>"], ["d", "<eos>"]  # with the end that TRL adds


def tokenizer():
    """One that splits at spaces."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "p"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def table(moved):
    """(4,V) log-probs of the next token at each position: -2 for the responses' tokens, plus what moved."""
    logp = torch.full((4, len(WORDS)), -9.0, dtype=torch.float64)
    for words, ratios in zip(RESPONSES, tokens.RATIOS):
        for t, (word, ratio) in enumerate(zip(words, ratios)):
            logp[t, WORDS[word]] = -2 + moved * ratio
    rest = 1 - logp.exp().sum(1) + logp[:, 1].exp()
    logp[:, 1] = rest.log()  # the prompt's word takes what is left
    return logp


def handmade(moved):
    """A GPT-2 that reads positions alone: its head is solved for, so that its log-probs are the table's."""
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=8, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        gpt2.transformer.wte.weight.zero_()
        for block in (gpt2.transformer.h[0].attn, gpt2.transformer.h[0].mlp):
            block.c_proj.weight.zero_()
            block.c_proj.bias.zero_()
        hidden = gpt2.transformer.ln_f(gpt2.transformer.wpe.weight[:4]).double()
        gpt2.lm_head.weight.copy_(torch.linalg.lstsq(hidden, table(moved)).solution.T)
    return gpt2


class Given:
    """Stands for a model whose log-probs of tokens (R,T) are given."""

    def __init__(self, logp):
        self.logp = logp

    def __call__(self, labels, **more):
        zero = torch.zeros(labels[:, 1:].shape)
        return SimpleNamespace(log_probs=self.logp * (labels[:, 1:] != -100), entropy=zero, mean_logits=zero,
                               log_sum_sq_probs=zero, is_top1=zero > 0)


class TokenLoss:
    """TRL's loss of token log-probs and masks, as lab/identify/tokens.py asks for it. Raises Unusable."""

    def __init__(self, loss_type, beta):
        datasets.disable_progress_bars()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            try:
                args = trl.DPOConfig(folder, loss_type=[loss_type], **beta, bf16=False, use_cpu=True,
                                     gradient_checkpointing=False, report_to="none", disable_tqdm=True)
                pairs = datasets.Dataset.from_list([PAIR])
                self.trainer = trl.DPOTrainer(handmade(1.0), handmade(0.0), args, train_dataset=pairs,
                                              processing_class=tokenizer())
                self.beta = args.beta
                batch = self.trainer.data_collator(list(self.trainer.train_dataset))
                self.real = self.trainer.compute_loss(self.trainer.model, batch).item()
            except ValueError as error:
                raise Unusable(str(error)) from None

    def __call__(self, c, r, rc, rr, chosen_mask, rejected_mask):
        mask = torch.cat([chosen_mask, rejected_mask])
        mask = torch.nn.functional.pad(mask, (1, 0))  # nothing predicts the first token
        batch = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask),
                 "completion_mask": mask}
        self.trainer.ref_model = Given(torch.cat([rc, rr]))
        quiet = warnings.catch_warnings(action="ignore")
        with quiet, mock.patch.object(torch.Tensor, "item", lambda tensor: 0.0):
            return self.trainer.compute_loss(Given(torch.cat([c, r])), batch)


def load(loss_type, beta):
    """TokenLoss, checked against the hand-made models. Raises Unusable."""
    loss = TokenLoss(loss_type, {} if beta is None else {"beta": beta})
    given, _ = tokens.fixture(loss, {})
    if not abs(given - loss.real) < 1e-4 * (1 + abs(given)):
        raise Unusable(f"TRL {trl.__version__}: {loss.real} from models, {given} from their log-probs")
    return loss
