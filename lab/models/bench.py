"""How many seconds and how much memory does a training step take here, and how many in TRL?

  python -m lab.models.bench --data FILE.jsonl --init_from GPT2 --rounds 3

GPT2 is a folder that transformers saved, or the hub id gpt2. For a model of another size train a step by
`python ipo.py --data FILE.jsonl --n_layer 6 ...`, and `python -m lab.models.export` makes a folder of it.

Fresh processes take turns: ours, TRL as it comes, TRL at its best (reference log-probs computed beforehand,
activations kept). Pairs, weights, optimiser and rate are the same, so the losses must agree, and the last
line says by how much they differ. The loss is DPO's, which TRL sums over tokens as the core does. IPO's costs
the same. What else runs on the machine disturbs seconds, so believe the ratios of many rounds.
Trap: where the tokens are decides. Long prompts favour us more than long responses do. Keep every pair
within the model's context, since TRL does not cut prompts as the core does.
"""
import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import data
import ipo
import model
from data import Refused
from lab.common import start
from lab.models import chat, hf

SIDES = {"ours": "ours", "trl": "TRL as it comes", "best": "TRL at its best"}
TAU, RATE = 0.1, 1e-5


def parse(argv):
    """Flags, checked. Raises Refused."""
    own = start.parser(__doc__)
    own.add_argument("--data", required=True, help="JSONL file of pairs")
    own.add_argument("--init_from", required=True, help="a folder or hub id of GPT-2's weights")
    own.add_argument("--steps", type=int, default=6, help="steps of a turn, 4 or more [6]")
    own.add_argument("--batch_size", type=int, default=4, help="pairs in a step [4]")
    own.add_argument("--rounds", type=int, default=3, help="how many turns of each [3]")
    own.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    own.add_argument("--device", choices=["cpu", ipo.DEVICE], default=ipo.DEVICE, help="where the model is")
    own.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one turn, in a process of its own
    args = own.parse_args(argv)
    for name, least in ("rounds", 1), ("steps", 4), ("batch_size", 1):
        if getattr(args, name) < least:
            raise Refused(f"--{name} is {getattr(args, name)}; it takes {least} and more")
    return args


def pairs_of(args):
    """The pairs that the steps take, in the file's order. Raises Refused."""
    n = args.steps * args.batch_size
    found = [pair for pair in data.read_jsonl(args.data) if pair.chosen != pair.rejected][:n]
    if len(found) < n:
        raise Refused(f"--data {args.data}: {len(found)} pairs; --steps {args.steps} of --batch_size "
                      f"{args.batch_size} need {n}")
    if any(pair.p != 1 for pair in found):
        raise Refused(f"--data {args.data}: TRL knows no p; leave the key out")
    return found


def ours(args, found):
    """Trains on the pairs as ipo.train does -> the losses, and when each step began."""
    policy, name = model.load(args.init_from)
    policy.to(args.device)
    pairs = data.encode(found, data.get_tokenizer(name), policy.config.block_size)
    pairs.ref_logp = ipo.score(policy, pairs, args)
    optimizer = ipo.adam(policy)  # TRL's AdamW has no weight decay, so it is the same
    losses, marks = [], []
    for index in torch.arange(len(found)).split(args.batch_size):
        marks.append(time.perf_counter())
        batch = pairs.batch(index)
        with ipo.precision(args):
            logp = ipo.sequence_logp(policy, batch.tokens, batch.mask)
        h = ipo.margin(logp, batch.ref_logp)
        loss = ipo.dpo_loss(h, batch.p, TAU).mean()
        loss.backward()
        ipo.optimizer_step(policy, optimizer, 1, 1, RATE)  # step 1 of 1 has the whole rate
        losses.append(loss.item())
    return losses, marks


def theirs(args, found, best):
    """The same by TRL's DPOTrainer."""
    chat.quiet()
    import datasets
    import trl
    losses, marks = [], []

    class Noted(trl.DPOTrainer):
        def compute_loss(self, *inputs, **more):
            marks.append(time.perf_counter())
            loss = super().compute_loss(*inputs, **more)
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            folder, beta=TAU, learning_rate=RATE, lr_scheduler_type="constant", max_length=None,
            max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            train_sampling_strategy="sequential", precompute_ref_log_probs=best,
            gradient_checkpointing=not best, bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu",
            save_strategy="no", report_to="none", disable_tqdm=True)
        # from_list keeps TRL's cache to this process, or the second turn would be faster
        pairs = datasets.Dataset.from_list([pair._asdict() for pair in found])
        Noted(args.init_from, args=config, train_dataset=pairs).train()
    return losses, marks


def turn(args):
    """One side's turn: prints its numbers as a line of JSON."""
    found = pairs_of(args)
    losses, marks = ours(args, found) if args.side == "ours" else theirs(args, found, args.side == "best")
    seconds = [after - before for before, after in itertools.pairwise(marks)][1:]  # the first is slower
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # Linux counts in KiB
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
    print(json.dumps({"seconds": statistics.median(seconds), "GiB": peak, "losses": losses}))


def compare(args, argv):
    """{side: [numbers of each round]}, each from a process of its own. Raises Stopped."""
    rounds = {side: [] for side in SIDES}
    for number, side in itertools.product(range(args.rounds), SIDES):
        command = [sys.executable, "-m", "lab.models.bench", *argv, "--side", side]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ipo.Stopped(f"{SIDES[side]} failed: {data.short(done.stderr.strip().splitlines()[-1])}")
        numbers = json.loads(done.stdout.splitlines()[-1])
        rounds[side].append(numbers)
        print(f"round {number + 1}, {SIDES[side]:15} {numbers['seconds']:9.4f} s a step  "
              f"{numbers['GiB']:6.2f} GiB", flush=True)
    return rounds


def answer(rounds):
    """The sentences: medians over rounds of theirs over ours, and how far the losses are apart."""
    def times(side, name):
        turns = zip(rounds[side], rounds["ours"])
        return statistics.median(theirs[name] / ours[name] for theirs, ours in turns)
    losses = torch.tensor([[numbers["losses"] for numbers in side] for side in rounds.values()])
    off = (losses - losses[0]).abs().max()
    return (f"TRL needs {times('trl', 'seconds'):.1f} times our seconds as it comes and "
            f"{times('best', 'seconds'):.1f} times at its best, and {times('trl', 'GiB'):.1f} and "
            f"{times('best', 'GiB'):.1f} times our memory. The losses differ by at most {off:.1g}.")


def run(argv):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    torch.set_num_threads(hf.THREADS)
    if args.side:
        return turn(args)
    pairs_of(args)  # refuses before the first turn
    print(f"\n{answer(compare(args, argv))}")


if __name__ == "__main__":
    sys.exit(start.main("bench", run))
