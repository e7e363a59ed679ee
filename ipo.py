"""nanoIPO: preference optimisation by IPO, small enough to read, on a world small enough to know the exact answer.

  objective  max_pi  E[ Psi(p*(y>y')) ] - tau KL(pi||ref),  y ~ pi, y' ~ mu             (Azar et al. 2023, eq. 6)
  optimum    pi*(y)  =  ref(y) exp( E_{y'~mu}[ Psi(p*(y>y')) ] / tau ) / Z              (eq. 7; Z normalises)
  margin     h       =  log pi(yw)/ref(yw) - log pi(yl)/ref(yl)                         (eq. 12)
  target(p)          =  ( Psi(p) - Psi(1-p) ) / (2 tau)         p = P(yw is preferred to yl)
  IPO                   ( h - target(p) )^2                     Psi(q) = q, p = 1: ( h - 1/(2 tau) )^2, eq. 17
  DPO                   -p log s(tau h) - (1-p) log s(-tau h)   eq. 4; its beta is our tau

Symbols: pi policy, ref frozen reference, mu where responses come from, yw / yl chosen / rejected response, s sigmoid.
Log-probs and margins are in nats; log pi(y) is a sum over the tokens of y. More tau: closer to ref.
Sizes: B pairs in a batch, T tokens, R rows (a row is a prompt with one response), X prompts, Y responses in a world.

  python ipo.py --loss ipo                        the synthetic world: train, then measure the distance to pi*
  python ipo.py --sample "review of the pizza:"   sample from the finished run
  python ipo.py --data FILE.jsonl                 pairs of your own
  python ipo.py --help
"""
import argparse
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data as D
import model as M

# ======================================= EXERCISE: what is a preference worth? =======================================


def psi(q):  # preference probabilities in [0,1], a tensor of any shape -> their worth, same shape
    return q


# ================================================= END OF THE EXERCISE ================================================


def target(p, tau):  # (B,) -> (B,)
    """The margin in nats that a pair asks for if its first response is preferred with probability p; a tie asks for 0.

    pi* is the least-squares compromise between all pairs. The 1/2 is exact: the two orders of a pair ask h for
    Psi(p)/tau and -Psi(1-p)/tau (if certain: 1/tau and 0); this is their mean. Raises ValueError unless tau > 0.
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    return (psi(p) - psi(1 - p)) / (2 * tau)


def ipo_loss(h, p, tau):  # (B,), (B,) -> (B,)
    """Squared distance to the target (eq. 17 at p = 1), nats^2. Slope 2 (h - target): it pulls back what overshot."""
    return (h - target(p, tau)) ** 2


def dpo_loss(h, p, tau):  # (B,), (B,) -> (B,)
    """Logistic loss (eq. 4 at p = 1). Slope -tau (p - s(tau h)): at p = 1 it never changes sign, so h never stops."""
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    return -p * F.logsigmoid(tau * h) - (1 - p) * F.logsigmoid(-tau * h)


LOSSES = {"ipo": ipo_loss, "dpo": dpo_loss}
OBJECTIVE = {"ipo": lambda q: psi(q), "dpo": torch.logit}  # the Psi of its optimum (DPO: prop. 1, Bradley-Terry only)


def margin(logp, ref_logp):  # (2B,), (2B,) -> (B,)
    """h: how much further, in nats, the policy moved towards the chosen than towards the rejected response."""
    chosen, rejected = (logp - ref_logp).chunk(2)
    return chosen - rejected


def train(model, pairs, ref_logp, args, generator, log):
    """Preference training on `pairs` against ref_logp (R,), the reference's log-probs of all rows, computed beforehand:
    no second model exists. Calls log(step, numbers) every --log_every steps and after the last."""
    update = M.descent(model, args.steps, args.lr)
    order = D.batches(len(pairs.p), args.batch_size, args.steps, generator)
    for step, index in enumerate(tqdm(order, args.loss, args.steps, disable=None, leave=False), 1):
        model.train()
        batch = pairs.batch(index)
        tokens, mask, p, ref = (z.to(args.device) for z in (batch.tokens, batch.mask, batch.p, ref_logp[batch.rows]))
        with M.autocast(model, args.dtype):
            logp = M.sequence_logp(model, tokens, mask, mean=args.logp == "mean")  # (2B,)
        h = margin(logp, ref)                                                      # (B,)
        loss = LOSSES[args.loss](h, p, args.tau).mean()                            # ()
        update(loss)
        if step % args.log_every == 0 or step == args.steps:
            log(step, measure(logp, ref, p, args))


# ---------------------------------------------------------------------------------------------------------- measurement

@torch.no_grad()
def measure(logp, ref_logp, p, args):  # (2B,), (2B,), (B,) -> dict of floats
    """The numbers of a log line. `win`: the share of pairs whose margin has the label's sign; ties (p = 1/2, or a
    margin under .0005 nats, which may be rounding) count one half. `target`: None if infinite, as DPO's is at p = 1."""
    h = margin(logp, ref_logp)
    chosen, rejected = (logp - ref_logp).chunk(2)
    asked = (target(p, args.tau) if args.loss == "ipo" else torch.logit(p) / args.tau).mean().item()
    win = ((h.round(decimals=3) * (p - 0.5)).sign().mean().item() + 1) / 2
    return {"loss": LOSSES[args.loss](h, p, args.tau).mean().item(), "h": h.mean().item(),
            "h_std": h.std(correction=0).item(), "target": asked if math.isfinite(asked) else None,
            "chosen": chosen.mean().item(), "rejected": rejected.mean().item(), "win": win}


def score_pairs(model, pairs, args):  # -> (2N,)
    """log pi of the chosen, then of the rejected responses, without gradient or dropout."""
    return M.score(model, pairs, pairs.pair_rows(), 2 * args.batch_size, args.dtype, args.logp == "mean")


def distribution(model, world, args):  # -> (X,Y) float64
    """log pi(y|x) of every response to every prompt of a world: the whole policy, by enumeration."""
    rows = torch.arange(world.reward.numel())
    return M.score(model, world.data, rows, 2 * args.batch_size, args.dtype).view(world.reward.shape).double()


def theory(world, ref, args):  # log ref (X,Y) -> mu, log pi*, log of the fitted policy (None: pi* itself), (X,Y) each
    """The fitted policy is IPO's minimiser on endless labels of this kind: ref exp(E_mu E[target]), normalised. It is
    pi* if labels are soft, or Psi affine and noise 0, and if Psi is odd about 1/2 up to a constant."""
    mu = torch.full_like(ref, 1 / ref.shape[1]) if args.mu == "uniform" else ref.exp()
    best = D.optimum(ref, world.pstar, mu, OBJECTIVE[args.loss], args.tau)
    if args.loss != "ipo":
        return mu, best, None
    q = world.pstar + args.noise * (1 - 2 * world.pstar)
    asked = target(q, args.tau) if args.labels == "soft" else (2 * q - 1) * target(torch.ones(()), args.tau)
    fit = D.optimum(ref, asked, mu, lambda value: value, 1.0)
    return mu, best, None if torch.allclose(fit, best, atol=1e-9) else fit


def check_targets(p, args):
    """Refuses a Psi that asks for an infinite margin at a probability that the labels hold; p of any shape."""
    if args.loss == "ipo" and not (finite := target(p, args.tau).isfinite()).all():
        worst = p[~finite].max().item()
        raise D.Refused(f"psi({worst:g}) - psi({1 - worst:g}) is not finite: this Psi asks for an infinite margin on "
                      "certain pairs, which is DPO's over-fitting; use labels with 0 < p < 1 (--labels soft, in a "
                      "world that is not deterministic) or a Psi that is finite at 0 and 1")


def check_start(model, pairs, ref_logp, args):
    """Step 0: pi = ref, so margins are 0 and the loss is known. Raises M.Stopped if the cache is another model's."""
    pairs = pairs.select(torch.arange(min(args.batch_size, len(pairs.p))))
    ref, logp = ref_logp[pairs.pair_rows()], score_pairs(model, pairs, args)
    off, loss = margin(logp, ref).abs().max().item(), measure(logp, ref, pairs.p, args)["loss"]
    due = (target(pairs.p, args.tau) ** 2).mean().item() if args.loss == "ipo" else math.log(2)
    print(f"step 0: loss {loss:.6g}, theory {due:.6g} ({'mean of target^2' if args.loss == 'ipo' else 'ln 2'})")
    rounding = (2e-2 if args.dtype == "bfloat16" else 1e-5) * (1 + ref.abs().max().item())
    if not (off <= rounding and abs(loss - due) <= 1e-5 * due + off * (off + 2 * due ** 0.5 + args.tau)):
        raise M.Stopped(f"step 0: margins up to {off:.3g} nats where pi = ref has 0, or the loss is not theory's; "
                        "the cached reference is not the policy that training starts from, or a loss was edited")


# --------------------------------------------------------------------------------------------------------------- output

def log_line(kind, step, args, n, extra=""):
    """One line of fixed width; the README says what the columns mean."""
    asked = "inf" if n["target"] is None else f"{n['target']:.2f}"
    ratios = f"chosen {n['chosen']:+6.2f} rejected {n['rejected']:+6.2f}"
    tqdm.write(f"{kind} {step:5d}/{args.steps} | loss {n['loss']:8.4f} | h {n['h']:+6.2f} ± {n['h_std']:5.2f} -> "
               f"{asked} | {ratios} | win {n['win']:.2f}{extra}", file=sys.stdout)


UNITS = {"kl_ref": "KL(pi||ref), nats", "kl_opt": "KL(pi||pi*), nats", "win": "win rate against mu",
         "objective": "objective J, of Psi", "ratio": "max |log pi/ref|, nats", "kl_fit": "KL(pi||labels), nats"}


def print_report(report):
    """A row per exact quantity, a column per policy: measured, then what theory expects; - is what is not finite."""
    show = lambda value: "         -" if value is None else f"{value:10.4f}"
    print(f"\n{'exact, mean over prompts':26}" + "".join(f"{column:>10}" for column in report))
    for key in report["after"]:
        print(f"{UNITS[key]:26}" + "".join(show(column[key]) for column in report.values()))
    if "labels" in report:
        print("labels = where these labels lead IPO, not pi*: a coin flip stands for p* only if Psi is affine and\n"
              "nothing flips it; a target sees Psi's odd part about 1/2 only. Try --labels soft, --noise 0, odd Psi")
    if report["optimum"]["kl_ref"] is None:
        print("No finite optimum: certain pairs always ask this loss for more: max |log pi/ref| grows with --steps.")


# ---------------------------------------------------------------------------------------------------------- the program

def prepare(args, generator):
    """(world or None, rows: a world's or the training pairs', held-out pairs or None, tokenizer, model)."""
    saved, extra = M.load_checkpoint(args.init_from) if args.init_from else (None, {})
    if saved:
        vars(args).update({size: getattr(saved.config, size) for size in SIZES}, tokenizer=extra["tokenizer"])
    if (args.task == "world") != (args.tokenizer in (None, "world")):
        raise D.Refused(f"--init_from {args.init_from}: its model is for tokenizer {args.tokenizer!r}, which does not "
                        f"fit --data {args.data}; start from a run on data of the same kind")
    world = held = None
    source = D.iter_jsonl(args.data) if args.task == "file" else None
    tokenizer = D.get_tokenizer(args.tokenizer or "world")
    if args.task == "world":
        world = D.build_world(args.data)
        data, config = world.data, M.GPTConfig(world.block_size, world.vocab_size, head_size=world.head_size)
    else:
        config = M.GPTConfig(args.block_size, tokenizer.n_vocab)
        data, held = D.split(D.encode(source, tokenizer, config.block_size), args.holdout, generator)
        print(f"data: {len(data.p):,} pairs to train on, {len(held.p):,} held out; no prompt is in both")
    vars(config).update({size: getattr(args, size) for size in SIZES if size != "block_size"})
    return world, data, held, tokenizer, M.place(saved or M.GPT(config), args.device)


def open_folder(args):
    """Makes --out, says if a run is replaced there, and writes its configuration."""
    try:
        os.makedirs(args.out, exist_ok=True)
        if os.path.exists(f"{args.out}/ckpt.pt"):
            print(f"{args.out}/ holds an earlier run; its files are replaced")
        with open(f"{args.out}/config.json", "w") as file:
            json.dump(vars(args) | {"torch": torch.__version__}, file, indent=1)
    except OSError as error:
        raise D.Refused(f"--out {args.out}: {error.strerror}; name a folder that can be written") from None


def make_reference(model, world, data, args, generator):
    """SFT on a world's base distribution, or on all responses of a file, rejected ones too; then the log-probs (R,) of
    all rows, which are the reference from now on."""
    n = 2 * args.batch_size
    if args.sft_steps:
        rows = world.sample(n * args.sft_steps, generator) if world else data.pair_rows()
        update = M.descent(model, args.sft_steps, args.sft_lr)
        bar = tqdm(D.batches(len(rows), n, args.sft_steps, generator), "sft", args.sft_steps, disable=None, leave=False)
        first, last = M.finetune(model, data, rows, bar, update, args.dtype)
        print(f"sft: {args.sft_steps} steps, {first:.3f} -> {last:.3f} nats per response token")
    M.save_checkpoint(f"{args.out}/ref.pt", model, tokenizer=args.tokenizer or "world")
    return M.score(model, data, torch.arange(len(data.prompt_len)), n, args.dtype, args.logp == "mean")


def pose(model, world, args, generator):
    """The world's problem: (pairs drawn from it, a function that measures the model exactly, what theory expects)."""
    ref = distribution(model, world, args)
    mu, best, fit = theory(world, ref, args)
    exact = lambda logp: D.exact(logp, ref, best, fit, world.pstar, mu, OBJECTIVE[args.loss], args.tau)
    print(f"world {world.name}: {ref.shape[0]} prompts x {ref.shape[1]} responses, whose probabilities sum to "
          f"{ref.exp().sum(-1).mean():.6f}; KL(base||ref) {D.base_kl(world.base, ref):.4f} nats\npairs: {args.pairs:,} "
          f"{args.labels}, each seen {(seen := args.steps * args.batch_size / args.pairs):.2f} times"
          + "; hard labels seen often are learned with their noise" * (args.labels == "hard" and seen > 2)
          + "\n--logp mean leads to a policy of its own; pi* below is the sum's" * (args.logp == "mean"))
    pairs = world.draw(args.pairs, mu, args.labels, args.noise, generator)
    if args.loss == "ipo" and args.logp == "sum":  # pi* averages contradictory pairs: its margins are not the targets
        final = best if fit is None else fit
        n = measure(*(z.flatten()[pairs.pair_rows()].float() for z in (final, ref)), pairs.p, args)
        print(f"expected at the end: loss {n['loss']:.4f}, h {n['h']:+.2f} ± {n['h_std']:.2f}, win {n['win']:.2f}")
    theirs = {"optimum": exact(best)} | ({} if fit is None else {"labels": exact(fit)})
    return pairs, lambda: exact(distribution(model, world, args)), theirs


def run(args):
    """Reference, its cached log-probs, preference training, report. What lasts goes to --out."""
    torch.manual_seed(args.seed)
    generator, seconds, begin = torch.Generator().manual_seed(args.seed), {}, time.perf_counter()

    def lap(stage):  # charges the time since the last lap to a stage
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begin - sum(seconds.values())

    world, pairs, held, tokenizer, model = prepare(args, generator)
    check_targets(torch.cat([pairs.p, held.p]) if held else world.pstar if args.labels == "soft" else torch.ones(1),
                  args)
    open_folder(args)
    lap("setup")
    ref_logp = make_reference(model, world, pairs, args, generator)  # (R,)
    lap("reference")
    if world:
        pairs, evaluate, expected = pose(model, world, args, generator)
        shown = pairs
    else:
        shown, kind = (held, "eval") if len(held.p) else (pairs, "eval of the training pairs")
        evaluate = lambda: measure(score_pairs(model, shown, args), ref_logp[shown.pair_rows()], shown.p, args)
    check_start(model, pairs, ref_logp, args)
    report, rows = {"before": evaluate()}, pairs.pair_rows()
    length = (pairs.start[rows + 1] - pairs.start[rows]).float().mean().item() * 2 * args.batch_size  # tokens in a step
    picked = [int(shown.chosen[(shown.prompt == x).nonzero()[0, 0]]) for x in shown.prompt.unique()[:3]]
    prompts = [pairs.prompt_ids(row) for row in picked]
    texts = [[M.continuation(model, x, tokenizer, args) for x in prompts]]
    lap("evaluation")

    with open(f"{args.out}/metrics.jsonl", "w", buffering=1) as metrics:  # 1: line by line
        def log(step, numbers):
            lap("training")
            now, extra = evaluate(), f" | {length * step / seconds['training'] / 1e3:.1f}k tok/s"
            M.check_finite(model, "--lr", numbers["loss"], now["kl_ref" if world else "loss"])
            if world:
                extra = f" | KL {now['kl_ref']:.2f}, to pi* {now['kl_opt'] or math.inf:.4f}" + extra  # None: infinite
            log_line("step", step, args, numbers, extra)
            if not world:
                log_line(kind, step, args, now)
            metrics.write(json.dumps({"step": step, "seconds": seconds["training"], **numbers, "eval": now}) + "\n")
            lap("evaluation")

        train(model, pairs, ref_logp, args, generator, log)
    M.save_checkpoint(f"{args.out}/ckpt.pt", model, tokenizer=tokenizer.name)
    report["after"] = evaluate()
    texts.append([M.continuation(model, x, tokenizer, args) for x in prompts])
    if world:
        print_report(report := report | expected)
    for x, reference, policy in zip(prompts, *texts):
        print(f"\n{tokenizer.decode(x)[-200:]!r}\n  reference {reference!r}\n  policy    {policy!r}")
    lap("evaluation")
    seconds["total"] = time.perf_counter() - begin
    print("\nseconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items()) + f"; files in {args.out}/")
    with open(f"{args.out}/report.json", "w") as file:
        json.dump(report | {"seconds": seconds}, file, indent=1)


def sample(args):
    """Prints the prompt of --sample and a continuation by the policy that a finished run left in --out."""
    model, extra = M.load_checkpoint(f"{args.out}/ckpt.pt")
    tokenizer = D.get_tokenizer(extra["tokenizer"])
    prompt, V = tokenizer.encode_ordinary(args.sample) or [tokenizer.eot_token], model.config.vocab_size
    if max(prompt) >= V:
        known = " ".join(repr(tokenizer.decode([i])) for i in range(V) if i != tokenizer.eot_token)
        raise D.Refused(f"--sample {args.sample!r}: holds a word outside this model's vocabulary; it knows {known}")
    if len(prompt) >= model.config.block_size:
        raise D.Refused(f"--sample: {len(prompt)} tokens fill the context of {model.config.block_size}; shorten it")
    print(args.sample + M.continuation(model.to(args.device), prompt, tokenizer, args))


def number(kind, low, high=math.inf, above=False):
    """A type for argparse: numbers from low (not itself, if `above`) to high."""
    def parse_number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or above and value == low:
            what = f"{'whole ' * (kind is int)}number {'>' if above else '>='} {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}" + f" and <= {high:g}" * (high < math.inf))
        return value
    return parse_number


SIZES = ("n_layer", "n_head", "n_embd", "block_size", "dropout")  # flags that a checkpoint fixes
NA = None  # the flag means nothing for that task, and is refused
TASKS = {"world": "in a synthetic world", "file": "for a JSONL file", "sample": "with --sample"}
positive, natural, count = number(float, 0, above=True), number(int, 1), number(int, 0)
FLAGS = [  # flag, type or choices, its default in a world, for a file, for --sample; its meaning and unit
    ("data", str, "bt", NA, NA, f"a synthetic world ({', '.join(D.WORLDS)}) or a JSONL file of preference pairs"),
    ("sample", str, NA, NA, "", "print a continuation of this prompt by the finished run in --out; trains nothing"),
    ("out", str, "out", "out", "out", "folder of the run's files"),
    ("init_from", str, "", "", NA, "checkpoint to start from and stay near (a run's ref.pt or ckpt.pt); '': none"),
    ("loss", list(LOSSES), "ipo", "ipo", NA, "loss on the margin"),
    ("tau", number(float, 1e-6, 1e6), 0.2, 0.1, NA, "pull to the reference, DPO's beta; target: 1/(2 tau) nats"),
    ("logp", ["sum", "mean"], "sum", "sum", NA, "log pi(y|x): the paper's sum over tokens, or their mean"),
    ("labels", ["hard", "soft"], "hard", NA, NA, "hard: a coin flip with p*, winner first; soft: p* itself"),
    ("noise", number(float, 0, 1), 0.0, NA, NA, "probability that a hard label is flipped"),
    ("mu", ["uniform", "ref"], "uniform", NA, NA, "where the responses of the pairs come from"),
    ("pairs", natural, 500_000, NA, NA, "pairs to draw; few, seen often, are learned with the noise of their labels"),
    ("tokenizer", D.TOKENIZERS, NA, "gpt2", NA, "tiktoken's GPT-2 encoding, or plain bytes"),
    ("holdout", number(float, 0, 0.9), NA, 0.1, NA, "share of the prompts whose pairs are held out"),
    ("steps", natural, 2000, 200, NA, "steps of preference training"),
    ("batch_size", natural, 256, 16, NA, "pairs in a step; more than there are: some come twice"),
    ("lr", positive, 1.5e-3, 1e-4, NA, "peak learning rate: reached in 50 steps or half of all, then down to 0"),
    ("sft_steps", count, 200, 400, NA, "maximum-likelihood steps that make the reference (--init_from: 0)"),
    ("sft_lr", positive, 3e-3, 1e-3, NA, "peak learning rate of those"),
    ("log_every", natural, 200, 50, NA, "steps from one log line to the next"),
    ("n_layer", natural, 1, 4, NA, "blocks"),
    ("n_head", natural, 4, 4, NA, "attention heads"),
    ("n_embd", natural, 32, 128, NA, "channels, a multiple of n_head"),
    ("block_size", number(int, 3), NA, 256, NA, "context in tokens; a world fixes its own"),
    ("dropout", number(float, 0, 0.9), 0.0, 0.0, NA, "share of activations dropped in training"),
    ("device", ["auto", "cpu", "cuda", "mps"], "auto", "auto", "auto", "auto: cuda if found, else mps, else cpu"),
    ("dtype", ["float32", "bfloat16"], "float32", "float32", NA, "of matrix products; weights, log-probs: float32"),
    ("seed", number(int, 0, 2**32 - 1), 0, 0, 0, "fixes weights, data, order and samples"),
    ("temperature", number(float, 0), 1.0, 1.0, 1.0, "of samples; 0 takes the likeliest token"),
    ("top_k", count, 0, 0, 0, "sample from the k likeliest tokens; 0: from all"),
    ("max_new_tokens", natural, 64, 64, 64, "longest sample"),
]


def parse(argv=None):
    """The arguments of a run: each flag that was given is honoured or refused by name, with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"ipo.py: {message}\n")  # one line, without the usage
    for flag, kind, *defaults, meaning in FLAGS:
        shown = ", ".join(f"{task}: {value!r}" for task, value in zip(TASKS, defaults) if value is not NA)
        how = {"choices" if isinstance(kind, list) else "type": kind}
        parser.add_argument(f"--{flag}", **how, help=f"{meaning} [{shown}]")
    given = vars(parser.parse_args(argv))
    task = "sample" if "sample" in given else "file" if given.get("data", "bt") not in D.WORLDS else "world"
    defaults = {flag: values[list(TASKS).index(task)] for flag, kind, *values, meaning in FLAGS}
    for flag in given:
        if defaults[flag] is NA and (flag, task) != ("data", "file"):
            parser.error(f"--{flag} means nothing {TASKS[task]}; leave it out")
    args = argparse.Namespace(task=task, **defaults | given)
    if args.init_from:
        args.sft_steps = given.get("sft_steps", 0)
        for flag in given.keys() & {*SIZES, "tokenizer"}:
            parser.error(f"--{flag} is fixed by the checkpoint of --init_from; leave it out")
    elif task != "sample" and args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}; change one of them")
    if "sft_lr" in given and not args.sft_steps:
        parser.error("--sft_lr means nothing without --sft_steps; leave it out or give both")
    if args.noise and args.labels == "soft":
        parser.error("--noise flips hard labels and --labels soft has none; leave one of the two out")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = next(d for d in there if there[d]) if args.device == "auto" else args.device
    if not there[args.device]:
        parser.error(f"--device {args.device}: torch finds none on this machine; use --device auto")
    return args


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for bad input, with one line on standard error."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or pipe may lack a sample's characters
    args = parse(argv)
    try:
        sample(args) if args.task == "sample" else run(args)
    except (D.Refused, M.BadCheckpoint, M.Stopped) as error:
        print(f"ipo.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, M.Stopped) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
