"""How many seconds and how much memory does a training step take here, and how many in TRL?

  python -m lab.models.bench --data FILE.jsonl --init_from GPT2

GPT2 is a folder that transformers saved, or the hub id gpt2. The first 24 pairs make six steps. Two fresh
processes take their turn: ours, and TRL at its best (reference log-probs computed beforehand, activations
kept). Pairs, weights, optimiser and rate are the same, and all is float32. So the losses must agree, and the
answer says by how much they differ. The loss is DPO's, which TRL sums over tokens as the core does. IPO's
costs the same.
Traps: what else runs on the machine disturbs seconds, so run it more than once. Where the tokens are decides:
long prompts favour us more than long responses do. Keep every pair within the model's context, since TRL does
not cut prompts as the core does.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
import ipo
import model
from lab.common import start
from lab.models import chat

STEPS, BATCH = 6, 4  # of a turn; pairs in a step
TAU, RATE = 0.1, 1e-5


def parse(argv):
    """Flags and the pairs that the steps take, in the file's order. Raises Refused."""
    own = start.parser(__doc__, "out/bench")
    own.add_argument("--data", required=True, help="JSONL file; the first 24 pairs count, p is taken for 1")
    own.add_argument("--init_from", required=True, help="a folder or hub id of GPT-2's weights")
    own.add_argument("--side", help=argparse.SUPPRESS)  # one turn, in a process of its own
    own.set_defaults(device=ipo.DEVICE, dtype="float32", batch_size=BATCH)
    args = own.parse_args(argv)
    found = [pair for pair in data.read_jsonl(args.data) if pair.chosen != pair.rejected]
    if len(found) < STEPS * BATCH:
        raise data.Refused(f"--data {args.data}: {len(found)} unequal pairs; give {STEPS * BATCH} or more")
    return args, found[:STEPS * BATCH]


def ours(args, found):
    """Trains on the pairs as ipo.train does -> the losses, and when each step began."""
    policy, name = model.load(args.init_from)
    policy.to(args.device)
    pairs = data.encode(found, data.get_tokenizer(name), policy.config.block_size)
    pairs.ref_logp = ipo.score(policy, pairs, args)
    optimizer = ipo.adam(policy)  # TRL's AdamW has no weight decay, so it is the same
    losses, marks = [], []
    for index in torch.arange(len(found)).split(BATCH):
        marks.append(time.perf_counter())
        batch = pairs.batch(index)
        logp = ipo.sequence_logp(policy, batch.tokens, batch.mask)
        # TRL knows no p but 1
        loss = ipo.dpo_loss(ipo.margin(logp, batch.ref_logp), 1, TAU).mean()
        loss.backward()
        ipo.optimizer_step(optimizer, 1, 1, RATE)  # step 1 of 1 has the whole rate
        losses.append(loss.item())
    return losses, marks


def theirs(args, found):
    """The same by TRL's DPOTrainer."""
    import datasets
    import trl
    marks = []

    class Clock(chat.quiet().TrainerCallback):
        def on_step_begin(self, *state, **more):
            marks.append(time.perf_counter())

    config = trl.DPOConfig(
        args.out, beta=TAU, learning_rate=RATE, lr_scheduler_type="constant", max_length=None,
        max_steps=STEPS, logging_steps=1, per_device_train_batch_size=BATCH, precompute_ref_log_probs=True,
        # 0.99 as in ipo.adam
        train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False, adam_beta2=0.99,
        use_cpu=args.device == "cpu", save_strategy="no", report_to="none", disable_tqdm=True)
    # from_list keeps TRL's cache to this process
    pairs = datasets.Dataset.from_list([pair._asdict() for pair in found])
    trainer = trl.DPOTrainer(args.init_from, args=config, train_dataset=pairs, callbacks=[Clock()])
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], marks


def turn(args, found):
    """One side's turn: prints its numbers as a line of JSON."""
    losses, marks = ours(args, found) if args.side == "ours" else theirs(args, found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # Linux counts in KiB
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
    seconds = torch.tensor(marks, dtype=torch.float64).diff()[1:].median()  # the first step is slower
    print(json.dumps({"seconds": seconds.item(), "GiB": peak, "losses": losses}))


def run(argv):
    args, found = parse(argv)
    if args.side:
        return turn(args, found)
    start.make_folder(args.out)
    turns = []
    for side in ("ours", "TRL"):
        print(f"{side}: {STEPS} steps")
        command = [sys.executable, "-W", "ignore", "-m", "lab.models.bench", *argv, "--side", side]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            *_, why = ["killed, perhaps for its memory; take a smaller model", *done.stderr.splitlines()]
            raise ipo.Stopped(f"{side} failed: {why}")
        turns.append(json.loads(done.stdout.splitlines()[-1]))
    ours, trl = turns
    off = max(abs(a - b) for a, b in zip(ours["losses"], trl["losses"]))
    row = start.Row()
    for unit in ("seconds", "GiB"):
        row[f"ours, {unit}"] = f"{ours[unit]:.3g}"
        row[f"TRL, {unit}"] = f"{trl[unit]:.3g}"
        row[f"times, {unit}"] = f"{trl[unit] / ours[unit]:.3g}"
    answer = (f"TRL needs {row['times, seconds']} times our seconds a step and {row['times, GiB']} times our "
              f"memory. The losses differ by at most {off:.1g}.")
    name = f"{Path(args.init_from).name}, {Path(args.data).stem}"
    start.finish(args, answer, start.table("model, pairs", {name: row}))


if __name__ == "__main__":
    raise SystemExit(start.main("bench", run, threads=torch.get_num_threads()))
