"""How fast is a training step, how near the machine's limit, how much memory, against TRL?

    python -m lab.models.bench --data pairs.jsonl --init_from gpt2 --logp mean --lr 1e-5 --steps 5 --batch_size 4
    python -m lab.models.bench ... --against trl        the same beside TRL's DPOTrainer (lab/models/peer.py)

Trains on the pairs in file order at a constant rate, writes no files, prints a line of JSON: step_s, the
median of a step's seconds without the first two (so --steps 3 or more); tokens_per_s, padding not counted;
peak_gib of this process, or of the GPU; matmul_gflops, 1e9 operations a second of large matrix products here
and now; floor_s, what the operations that a step's pairs need take at that rate: 6 for each matrix parameter
and token, forward and backward, causal attention, the head on response tokens, a pair's prompt once;
times_floor, a step's seconds over its floor (medians over the same steps as step_s); losses of every step.

--against trl: fresh processes take turns, --rounds times: ours, TRL as it comes, TRL at its best (reference
log-probs computed beforehand, no recomputation). Same pairs, weights, optimiser, rate: losses must agree.
TRL's IPO is the mean form. What else runs on the machine disturbs seconds: believe ratios, and user_s, the
processor's seconds of a step.

Answer: against the core before its rewrite (66354ca), seconds a step .91 (7M parameters, batch 8), .97 (124M,
batch 4), .97 (the same, bfloat16), on pairs of 150 to 500 tokens .77, .87, .61; peak memory .98 to 1.07.
TRL 1.16 takes 12 (7M) and 2.9 times (124M) our seconds on short rows, 59 times (7M) on 150 to 500 tokens.
"""
import argparse
import contextlib
import itertools
import json
import resource
import statistics
import sys
import time

import torch

import data
import ipo
import model


def prepare(args):
    """(policy, source) of a file's pairs, none held out. Raises Refused."""
    policy, saved = model.load(args.init_from) if args.init_from else (None, {})
    args.tokenizer, args.holdout = saved.get("tokenizer", args.tokenizer), 0.0
    args.block_size = policy.config.block_size if policy else args.block_size
    source = ipo.FileSource(args)
    policy = policy or model.GPT(model.GPTConfig(*source.sizes, args.n_layer, args.n_head, args.n_embd))
    if policy.config.vocab_size < source.sizes[1]:
        raise data.Refused(f"--init_from {args.init_from}: its model knows other words than {args.data}")
    if args.steps * args.batch_size > len(source.train):
        raise data.Refused(f"--steps {args.steps} of --batch_size {args.batch_size}: there are only "
                           f"{len(source.train)} pairs; lower one of the two")
    return policy.to(args.device), source.pairs


def train(policy, pairs, ref_logp, args):
    """Yields the loss of each step, after it: ipo.train's body on pairs in order; rate and betas TRL's."""
    optimizer = ipo.adamw(policy)
    optimizer.param_groups[0]["betas"] = 0.9, 0.999
    for index in torch.arange(args.steps * args.batch_size).split(args.batch_size):
        batch, ref = pairs.batch(index, args.device), ref_logp[pairs.pair_rows(index)].to(args.device)
        with ipo.autocast(args):
            logp = ipo.sequence_logp(policy, batch.tokens, batch.mask, args.logp == "mean")
        loss = ipo.LOSSES[args.loss](ipo.margin(logp, ref), batch.p, args.tau).mean()
        loss.backward()
        ipo.descend(policy, optimizer, 1, 1, args.lr)  # step 1 of 1: the rate is its peak
        yield loss.item()


def clocks():
    """Seconds on the wall's clock and on the processor's."""
    return time.perf_counter(), time.process_time()


def medians(marks):
    """step_s, user_s: medians of a step's seconds, without the first two. marks: clocks() before the first
    and after each."""
    wall, processor = zip(*marks)
    seconds = {"step_s": wall, "user_s": processor}
    for name, clock in seconds.items():
        each = [after - before for before, after in itertools.pairwise(clock)]
        seconds[name] = statistics.median(each[2:] or each)
    return seconds


def peak_memory(device):
    """The most GiB that this process has held so far: of the GPU, else as the operating system counts."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def matmul_rate(args, n=2048):
    """Operations a second of square matrix products on this machine, now: the best of ten."""
    a, seconds = torch.randn(n, n, device=args.device, dtype=getattr(torch, args.dtype)), []
    for _ in range(10):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return 2 * n ** 3 / min(seconds)


def flops(policy, pairs, index):
    """Operations that these pairs need together, as the docstring counts them."""
    c, length = policy.config, pairs.start.diff().double()
    prompt = pairs.prompt_len[pairs.chosen[index]].double()
    chosen, rejected = length[pairs.chosen[index]], length[pairs.rejected[index]]
    matrices = sum(p.numel() for p in policy.transformer.h.parameters() if p.dim() == 2)
    linear = matrices * (chosen + rejected - prompt).sum()
    attention = c.n_layer * c.n_embd * (chosen ** 2 + rejected ** 2 - prompt ** 2).sum()
    head = c.n_embd * c.vocab_size * (chosen + rejected - 2 * prompt).sum()
    return 6 * (linear + attention + head).item()


def ours(args):
    """The numbers of a run of ours, by name."""
    torch.manual_seed(args.seed)
    policy, pairs = prepare(args)
    index = torch.arange(args.steps * args.batch_size)
    rows, ref_logp = pairs.pair_rows(index), torch.zeros(len(pairs.prompt_len))
    ref_logp[rows] = ipo.score(policy, pairs, rows, args, args.logp == "mean")
    marks, losses = [clocks()], []
    for loss in train(policy, pairs, ref_logp, args):
        losses.append(loss)
        marks.append(clocks())
    numbers = medians(marks)
    numbers["tokens_per_s"] = pairs.start.diff()[rows].sum().item() / args.steps / numbers["step_s"]
    numbers["peak_gib"], rate = peak_memory(args.device), matmul_rate(args)
    numbers["matmul_gflops"] = rate / 1e9
    floors = [flops(policy, pairs, these) / rate for these in index.split(args.batch_size)]
    times = zip(itertools.pairwise(marks), floors)
    ratios = [(after[0] - before[0]) / floor for (before, after), floor in times]
    numbers["floor_s"] = statistics.median(floors[2:] or floors)
    numbers["times_floor"] = statistics.median(ratios[2:] or ratios)
    return numbers | {"losses": losses}


def parse(argv):
    """The flags of ipo.py and three more, checked. Raises Refused."""
    parser = ipo.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                        epilog="All other flags are those of ipo.py: python ipo.py --help")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice [0]")
    parser.add_argument("--against", default="", choices=["", "trl"], help="whom to run in turns with ['']")
    parser.add_argument("--rounds", type=int, default=3, help="how many turns [3]")
    own, rest = parser.parse_known_args(argv)
    args = argparse.Namespace(**vars(ipo.parse(rest)), **vars(own))
    if args.data in data.WORLDS:
        raise data.Refused(f"--data {args.data}: a world's model is too small to time; name a JSONL file")
    if args.against and not (args.init_from and args.loss == "ipo" and args.logp == "mean"):
        raise data.Refused("--against trl: TRL's IPO divides by lengths and starts from a folder or id of "
                           "transformers; give --loss ipo --logp mean --init_from FOLDER")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    return args


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for bad input, with one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        with contextlib.redirect_stdout(sys.stderr):
            if args.against:
                from lab.models import peer
                numbers = peer.compare(args, argv)
            else:
                numbers = ours(args)
        print(json.dumps(numbers))
        return 0
    except (data.Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print("bench.py:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (data.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
