"""How do I run the paper's IPO on my own models: on several GPUs, with LoRA, in 4 bits?

    python -m lab.models.trl_ipo --model M --data pairs.jsonl --beta 0.1 --output_dir out/trl
    ... --use_peft --lora_r 16                                LoRA; with --load_in_4bit QLoRA
    accelerate launch --num_processes 2 -m lab.models.trl_ipo ...    also FSDP, DeepSpeed: --config_file

TRL 1.16 trains; the loss is the core's: h from SUMS over tokens (TRL's loss_type "ipo" divides by lengths), p
from a column "p" (1 where there is none), any ipo.psi, any of ipo.LOSSES (--loss); --beta is tau. Other flags
are TRL's (DPOConfig, ModelConfig); those that would change its loss are refused. Pairs are read as lab/models/hf.py
reads them, and tokenised by TRL. The reference is scored once, before training; at step 0 the margins must be
0, or it stops. The log shows h and its two parts, in nats.

Traps: TRL trains in bfloat16 and recomputes activations unless --bf16 False --gradient_checkpointing False.
Its batch is --per_device_train_batch_size x processes x --gradient_accumulation_steps. Its --max_length cuts
the ends of responses, without a word; here nothing is cut: take what the model cannot hold out of the file.

Answer: by a subclass of DPOTrainer. Float32, ten steps, largest relative difference of a loss: from the core
1.6e-5 (7M parameters, rows of 150 to 500 tokens) and 9.7e-6 (GPT-2 124M, shorter rows), 0 at step 0; two
processes from one 3.1e-6, with and without FSDP.
"""
import sys
from functools import partial

import datasets
import torch
import trl

import ipo
from lab.models import chat, hf

# TRL's defaults of what would change its loss or cut responses, and changes nothing here
UNUSED = {"loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None, "f_divergence_type": "reverse_kl",
          "label_smoothing": 0.0, "use_weighting": False, "router_aux_loss_coef": None, "max_length": 1024}


def with_p(pad, pairs):
    """The batch that pad, TRL's collator, makes of these pairs, and "p", (B,)."""
    return pad(pairs) | {"p": torch.tensor([1.0 if pair.get("p") is None else pair["p"] for pair in pairs])}


class IPOTrainer(trl.DPOTrainer):
    """DPOTrainer with the core's margin and losses; args: a DPOConfig, whose beta is tau. Raises Refused."""

    def __init__(self, model, args, train_dataset, loss="ipo", **more):
        if any(getattr(args, flag) not in (default, None) for flag, default in UNUSED.items()):
            raise ipo.Refused(f"leave out, for they would do nothing or cut responses: {', '.join(UNUSED)}")
        # p would be an unused column
        args.max_length, args.precompute_ref_log_probs, args.remove_unused_columns = None, True, False
        super().__init__(model, args=args, train_dataset=train_dataset, **more)
        self.data_collator = partial(with_p, self.data_collator)
        half = args.bf16 or args.fp16 or self.model.dtype != torch.float32
        args.loss, args.tau, args.dtype = loss, args.beta, "bfloat16" if half else "float32"  # for the core

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        # TRL's head, in chunks: log-probs of tokens, 0 outside responses
        out = model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True)
        logp = out.log_probs.float().sum(1)                                               # (2B,)
        ref_logp = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])  # (2B,) sums, too
        h = ipo.margin(logp, ref_logp)                                                    # (B,)
        loss = ipo.LOSSES[self.args.loss](h, inputs["p"], self.args.tau).mean()           # ()
        if self.state.global_step == 0:  # of every part of the first batch
            ipo.check_start(h, loss, logp, inputs["p"], self.args)
        chosen, rejected = self.accelerator.gather((logp - ref_logp).detach().chunk(2))  # of all processes
        for name, value in {"h": chosen - rejected, "chosen": chosen, "rejected": rejected}.items():
            self._metrics["train" if model.training else "eval"][name].append(value.mean().item())
        return (loss, out) if return_outputs else loss


class Parser(ipo.Parser, trl.TrlParser):
    """TRL's, which refuses in one line."""


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for bad input, with one line on stderr."""
    try:
        parser = Parser((trl.DPOConfig, trl.ModelConfig), description=__doc__.splitlines()[0])
        parser.add_argument("--data", required=True, help="JSONL file: prompt, chosen, rejected, perhaps p")
        parser.add_argument("--loss", default="ipo", choices=ipo.LOSSES, help="loss on the margin [ipo]")
        parser.add_argument("--model", dest="model_name_or_path", required=True, help="folder or hub id")
        args, m, own = parser.parse_args_and_config(argv)
        args.model_init_kwargs = {"dtype": m.dtype, "attn_implementation": m.attn_implementation,
                                  "revision": m.model_revision} | (args.model_init_kwargs or {})
        found = [*hf.read(own.data, chat.Tokenizer(m.model_name_or_path))]
        pairs = [pair._asdict() for pair in found if pair.chosen != pair.rejected]
        print(f"pairs: {len(pairs):,} of {len(found):,}; those with two equal responses are dropped")
        if not pairs:
            raise ipo.Refused(f"--data {own.data}: no usable pair; give lines with two different responses")
        # not from_list: this writes a file, in which all processes find the same
        pairs = datasets.Dataset.from_generator(pairs.__iter__)
        trainer = IPOTrainer(m.model_name_or_path, args, pairs, own.loss, peft_config=trl.get_peft_config(m),
                             quantization_config=trl.get_quantization_config(m))
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        return 0
    # TRL refuses flags by ValueError, and what is not installed by ImportError
    except (ValueError, ipo.Stopped, OSError, ImportError, KeyboardInterrupt) as error:
        print("trl_ipo.py:", (str(error) or "interrupted").splitlines()[0], file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
