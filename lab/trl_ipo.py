"""How do I run the paper's IPO on my own models: on several GPUs, with LoRA, in 4 bits?

    python -m lab.trl_ipo --model_name_or_path M --data pairs.jsonl --beta 0.1 --output_dir out/trl ...
    accelerate launch --num_processes 2 -m lab.trl_ipo ...    also FSDP, DeepSpeed: --config_file
    ... --use_peft --lora_r 16                                LoRA; with --load_in_4bit QLoRA

TRL 1.16 trains; the loss is the core's: h from SUMS over tokens (TRL's loss_type "ipo" divides by lengths), p
from a column "p" (1 where there is none), any ipo.psi, any of ipo.LOSSES (--loss); --beta is tau. Every flag
of DPOConfig and ModelConfig is TRL's own, but those that would change its loss are refused. The reference is
scored once, before training, as in the core; at step 0 the margins must be 0. Pairs are TRL's, too: texts or
lists of messages.

Traps: TRL trains in bfloat16 and recomputes activations unless --bf16 False --gradient_checkpointing False.
Its batch is --per_device_train_batch_size x processes x --gradient_accumulation_steps. It reads prompt +
response as one text.

Answer: by a subclass of DPOTrainer, 60 code lines; its losses are not yet compared with the core's in the
suite.
"""
import sys
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import datasets
import torch
import trl

import ipo

# what would change TRL's loss, and changes nothing here
UNUSED = "loss_type loss_weights ld_alpha f_divergence_type label_smoothing use_weighting " \
         "router_aux_loss_coef"


def with_p(collate, pairs):
    """TRL's batch of these pairs, and "p", (B,)."""
    p = [1.0 if pair.get("p") is None else pair["p"] for pair in pairs]
    return collate(pairs) | {"p": torch.tensor(p)}


class IPOTrainer(trl.DPOTrainer):
    """DPOTrainer with the core's margin and losses; args: a DPOConfig, whose beta is tau. Raises Refused."""

    def __init__(self, model, args, train_dataset, loss="ipo", **more):
        plain = trl.DPOConfig(args.output_dir, use_cpu=True)
        for flag in UNUSED.split():
            if getattr(args, flag) != getattr(plain, flag):
                raise ipo.Refused(f"--{flag} belongs to TRL's losses, and the core's is used; leave it out")
        args.precompute_ref_log_probs, args.remove_unused_columns = True, False  # or TRL would remove p
        super().__init__(model, args=args, train_dataset=train_dataset, **more)
        self.data_collator = partial(with_p, self.data_collator)
        exact = self.model.dtype == torch.float32 and not (args.bf16 or args.fp16)
        self.flags = SimpleNamespace(loss=loss, tau=args.beta, dtype="float32" if exact else "bfloat16")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        # TRL's head, in chunks: log-probs of tokens, 0 outside responses
        outputs = model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels,
                        fused_lm_head=True)
        logp = outputs.log_probs.float().sum(1)                                           # (2B,)
        ref_logp = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])  # (2B,) sums, too
        h = ipo.margin(logp, ref_logp)                                                    # (B,)
        loss = ipo.LOSSES[self.flags.loss](h, inputs["p"], self.flags.tau).mean()         # ()
        if self.state.global_step == 0:  # of every part of the first batch
            ipo.check_start(h, loss, logp, inputs["p"], self.flags)
        for name, value in {"h": h, "chosen": (logp - ref_logp)[:len(h)]}.items():
            mean = self.accelerator.gather(value.detach()).mean().item()  # over processes
            self._metrics["train" if model.training else "eval"][name].append(mean)
        return (loss, outputs) if return_outputs else loss


@dataclass
class Flags:
    data: str = field(metadata={"help": "JSONL file of pairs: prompt, chosen, rejected, perhaps p"})
    loss: str = field(default="ipo", metadata={"help": "loss on the margin", "choices": [*ipo.LOSSES]})


class Parser(ipo.Parser, trl.TrlParser):
    """TRL's, which refuses in one line."""


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for bad input, with one line on stderr."""
    try:
        flags, args, m = Parser((Flags, trl.DPOConfig, trl.ModelConfig)).parse_args_and_config(argv)
        args.model_init_kwargs = {"dtype": m.dtype, "attn_implementation": m.attn_implementation,
                                  "revision": m.model_revision} | (args.model_init_kwargs or {})
        pairs = datasets.load_dataset("json", data_files=flags.data, split="train")
        if "p" in pairs.column_names and not all(q is None or 0 <= q <= 1 for q in pairs["p"]):
            raise ipo.Refused(f"--data {flags.data}: 'p' is P(chosen is preferred), from 0 to 1")
        peft = trl.get_peft_config(m)
        trainer = IPOTrainer(m.model_name_or_path, args, pairs, flags.loss, peft_config=peft,
                             quantization_config=trl.get_quantization_config(m))
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        return 0
    except (ValueError, ipo.Stopped, OSError, KeyboardInterrupt) as error:  # TRL refuses flags by ValueError
        print("trl_ipo.py:", (str(error) or "interrupted").splitlines()[0], file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
