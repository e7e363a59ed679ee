"""How do I run the paper's IPO on my own models: on several GPUs, with LoRA, in 4 bits?

  python -m lab.models.trl_ipo --model MODEL --data FILE.jsonl --tau 0.1 --output_dir out/trl
  ... --use_peft --lora_r 16                                LoRA; with --load_in_4bit QLoRA
  accelerate launch --num_processes 2 -m lab.models.trl_ipo ...     on two GPUs
  torchrun --nproc_per_node 2 -m lab.models.trl_ipo ...             on a CPU, where accelerate starts one

TRL trains, and the loss is the core's. h comes from sums over tokens, where TRL's own loss_type "ipo" divides
by lengths. p comes from a column "p" (1 where there is none), Psi from ipo.psi, --loss from ipo.LOSSES. Other
flags are TRL's (DPOConfig, ModelConfig), but --beta is --tau. What would change the loss is refused.
Pairs are read as lab/models/hf.py reads them, and tokenised by TRL. The reference is scored once, before
training, into OUTPUT_DIR/cache. Before the first step all margins must be 0, or it stops.

Traps: on a GPU, TRL trains in bfloat16 and recomputes activations, unless --bf16 False and
--gradient_checkpointing False. Its batch is --per_device_train_batch_size x processes x
--gradient_accumulation_steps. Its --max_length would cut the ends of responses. Here nothing is cut. A pair
that is longer than the model's context is left out.
"""
import os
import shutil
import warnings
from collections import Counter
from functools import partial

import torch

import data
import ipo
from lab.common import start
from lab.models import chat

chat.quiet()
import accelerate  # noqa: E402: after transformers is quiet
import datasets  # noqa: E402
import trl  # noqa: E402

# what would change TRL's loss or cut responses, and would do nothing here, and --config, which might hold it
UNUSED = """loss_type loss_weights ld_alpha f_divergence_type label_smoothing use_weighting
            router_aux_loss_coef max_length precompute_ref_log_probs remove_unused_columns
            config beta""".split()


def with_p(pad, pairs):
    """The batch that pad, TRL's collator, makes of these pairs, and "p", (B,)."""
    p = [1.0 if pair.get("p") is None else pair["p"] for pair in pairs]
    return pad(pairs) | {"p": torch.tensor(p)}


class IPOTrainer(trl.DPOTrainer):
    """DPOTrainer with the core's margin and losses; args: a DPOConfig, whose beta is tau."""

    def __init__(self, model, args, train_dataset, loss="ipo", **more):
        args.max_length, args.precompute_ref_log_probs = None, True
        args.remove_unused_columns = False  # p would be one
        super().__init__(model, args=args, train_dataset=train_dataset, **more)
        self.data_collator = partial(with_p, self.data_collator)
        self.loss = ipo.LOSSES[loss]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        # TRL's head, in chunks: log-probs of tokens, 0 outside responses
        out = model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True)
        logp = out.log_probs.float().sum(1)                                               # (2B,)
        ref_logp = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])  # (2B,) sums, too
        h = ipo.margin(logp, ref_logp)                                                    # (B,)
        loss = self.loss(h, inputs["p"], self.args.beta).mean()                           # ()
        if not loss.isfinite():
            raise ipo.Stopped("the loss is not finite; lower --learning_rate, or raise --tau")
        half = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        # rounding adds up like a random walk over the tokens of a response
        rounding = (0.05 if half else 1e-4) * mask.sum(1).max().sqrt()
        if self.state.global_step == 0 and h.abs().max() > rounding:  # of every part of the first batch
            raise ipo.Stopped(f"before the first step a margin is {h.abs().max():.3g}, not 0: the policy is "
                              "not its reference; set every dropout in the model's config.json to 0")
        h = self.accelerator.gather(h.detach())  # of all processes
        self._metrics["train" if model.training else "eval"]["h"].append(h.mean().item())
        return (loss, out) if return_outputs else loss


class Parser(ipo.Parser, trl.TrlParser):
    """TRL's, which refuses in one line."""


def parse(argv):
    """(DPOConfig, ModelConfig, own flags). Raises Refused."""
    start.refuse_given(argv, UNUSED, "would change the loss or do nothing here (beta is --tau)")
    if not torch.accelerator.is_available():
        print("no GPU here: the CPU trains, in float32 (--use_cpu True --bf16 False)")
        argv += ["--use_cpu", "True", "--bf16", "False"]
    parser = Parser((trl.DPOConfig, trl.ModelConfig), description=__doc__.splitlines()[0],
                    allow_abbrev=False)
    parser.add_argument("--data", required=True, help="JSONL file: prompt, chosen, rejected, perhaps p")
    parser.add_argument("--loss", default="ipo", choices=ipo.LOSSES, help="loss on the margin [ipo]")
    parser.add_argument("--model", dest="model_name_or_path", required=True, help="folder or hub id")
    parser.add_argument("--tau", default="0.1", help="strength of the pull to the reference [0.1]")
    args, m, own, rest = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (TRL has --max_steps, --learning_rate, ...)")
    args.beta = ipo.value_of("tau", own.tau, "0.001..1e9")
    kwargs = {"dtype": m.dtype, "attn_implementation": m.attn_implementation, "revision": m.model_revision}
    args.model_init_kwargs = kwargs | (args.model_init_kwargs or {})
    return args, m, own


def read(path, name):
    """The pairs of a file that can be trained on, as dicts; says which are left out. Raises Refused."""
    tokenizer = chat.Tokenizer(name)
    found = data.read_jsonl(path, partial(chat.parse_pair, tokenizer=tokenizer))
    size, notes = tokenizer.context(10**9), Counter()
    data.count_oddities(found, notes)
    data.tell(path, notes)
    kept = []
    for pair in found:
        prompt, *responses = (len(tokenizer.encode_ordinary(text)) for text in pair[:3])
        if pair.chosen != pair.rejected and prompt + max(responses) < size:
            kept.append(pair._asdict())
    print(f"{len(found) - len(kept):,} of {len(found):,} pairs left out, of two equal responses or more than "
          f"the model's {size:,} tokens; now the reference scores the others")
    if not kept:
        raise data.Refused(f"--data {path}: no usable pair; give pairs of two different responses that fit")
    return kept


def run(argv):
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"  # TRL's bar while it scores the reference
    warnings.simplefilter("ignore", FutureWarning)  # what TRL's own defaults make transformers say
    try:
        args, m, own = parse([*argv])
        cache = f"{args.output_dir}/cache"
        state = accelerate.PartialState()
        if state.is_main_process:  # a reference that an earlier run scored may be another
            shutil.rmtree(cache, ignore_errors=True)
        state.wait_for_everyone()
        pairs = read(own.data, m.model_name_or_path)
        # not from_list: this writes a file, in which all processes find the same
        pairs = datasets.Dataset.from_generator(pairs.__iter__, cache_dir=cache)
        trainer = IPOTrainer(m.model_name_or_path, args, pairs, own.loss,
                             peft_config=trl.get_peft_config(m),
                             quantization_config=trl.get_quantization_config(m))
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
    except Exception as error:  # of any kind, where TRL, transformers or safetensors cannot use something
        why = f"{start.reason(error)}; change the flag that this is about, --help lists all"
        raise error if isinstance(error, data.Refused) else data.Refused(why) from None
    print(f"\nTrained by {state.num_processes} process(es); it is in {data.one_line(args.output_dir)}.")


if __name__ == "__main__":
    raise SystemExit(start.main("trl_ipo", run, threads=torch.get_num_threads()))
