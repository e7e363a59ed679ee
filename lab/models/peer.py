"""What does TRL's DPOTrainer need for the steps that lab/models/bench.py times?

    python -m lab.models.bench [flags] --against trl      ours and TRL in turns; the medians of both
    python -m lab.models.peer  [flags] [--best]           one run of TRL, in bench's form; all flags are bench's

TRL's loss_type "ipo": log-ratios divided by the response's length, the core's --logp mean. Pairs in file
order, no dropout, constant rate, AdamW, clipping at 1, beta = tau. --best: what makes TRL fastest here,
reference log-probs computed beforehand and activations kept; without it both are as TRL sets them (a second
model, recomputation). TRL keeps tokens and reference log-probs in a cache: each process gets an empty one, or
the second would be faster. Its losses must be ours, or two different computations are timed:
loss_difference says how far apart they are.

Answer: as it comes TRL 1.16 takes 12 (7M, short rows), 59 (7M, long rows) and 2.9 times (124M) our seconds,
at its best 9.6, 45 and 2.3; its losses are ours to 1.4e-5 (float32).
"""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile

import datasets
import torch
import transformers
import trl

import data
import ipo
from lab.models import bench


def compare(args, argv):
    """Runs ours and TRL in turns, each in a process of its own: medians, and of what TRL needs over ours."""
    commands = {"ours": ["lab.models.bench", *argv, "--against", ""], "trl": ["lab.models.peer", *argv],
                "trl_best": ["lab.models.peer", *argv, "--best"]}
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    lines = {name: [] for name in commands}
    for name in [*commands] * args.rounds:
        done = subprocess.run([sys.executable, "-m", *commands[name]], env=os.environ | threads,
                              stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ipo.Stopped(f"python -m {' '.join(commands[name])}: exit status {done.returncode}")
        lines[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(name, json.dumps(lines[name][-1]), file=sys.stderr, flush=True)
    return {name: summary(lines[name], lines["ours"]) for name in commands}


def summary(lines, ours):
    """Medians of one side's runs: seconds, GiB, both over ours in the same turn; the largest difference of a
    loss from ours."""
    numbers = {}
    for key in ("step_s", "user_s", "peak_gib"):
        numbers[key] = statistics.median(line[key] for line in lines)
        numbers[f"{key}_over_ours"] = statistics.median(a[key] / b[key] for a, b in zip(lines, ours))
    losses = [torch.tensor([line["losses"] for line in side]) for side in (lines, ours)]
    return numbers | {"loss_difference": (losses[0] - losses[1]).abs().max().item()}


class Clock(transformers.TrainerCallback):
    """Notes the time before the first step and after each."""

    def __init__(self):
        self.marks = []

    def on_train_begin(self, *state, **more):
        self.marks.append(bench.clocks())

    def on_step_end(self, *state, **more):
        self.marks.append(bench.clocks())


class Noted(trl.DPOTrainer):
    """Notes the losses."""
    losses = []

    def compute_loss(self, *inputs, **more):
        loss = super().compute_loss(*inputs, **more)
        self.losses.append(loss.item())
        return loss


def theirs(args, best, folder):
    """The numbers of a run of TRL, by name."""
    pairs = [pair._asdict() for pair in data.read_jsonl(args.data) if pair.chosen != pair.rejected]
    if not all(pair["p"] == 1 for pair in pairs):
        raise data.Refused(f"--data {args.data}: TRL's IPO knows no p; leave the key out")
    config = trl.DPOConfig(
        folder, loss_type=["ipo"], beta=args.tau, learning_rate=args.lr, lr_scheduler_type="constant",
        max_steps=args.steps, per_device_train_batch_size=args.batch_size, max_length=None, seed=args.seed,
        train_sampling_strategy="sequential", precompute_ref_log_probs=best, gradient_checkpointing=not best,
        bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", save_strategy="no", report_to="none",
        disable_tqdm=True)
    pairs, clock = datasets.Dataset.from_list(pairs[:args.steps * args.batch_size]), Clock()
    trainer = Noted(args.init_from, args=config, train_dataset=pairs, callbacks=[clock])
    trainer.train()
    numbers = bench.medians(clock.marks)
    return numbers | {"peak_gib": bench.peak_memory(args.device), "losses": trainer.losses}


def main(argv=None):
    """The command line: a line of JSON. Exit status as bench's."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = bench.parse([flag for flag in argv if flag != "--best"] + ["--against", "trl"])
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            numbers = theirs(args, "--best" in argv, folder)
        print(json.dumps(numbers))
        return 0
    except (data.Refused, OSError) as error:
        print("peer.py:", error, file=sys.stderr)
        return 2 if isinstance(error, data.Refused) else 1


if __name__ == "__main__":
    sys.exit(main())
