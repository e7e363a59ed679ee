"""nanoIPO: preference optimisation by IPO, small enough to read, on a world small enough to know the exact answer.

  objective  max_pi  E[ Psi(p*(y>y')) ] - tau KL(pi||ref),  y ~ pi, y' ~ mu             (Azar et al. 2023, eq. 6)
  optimum    pi*(y)  ~  ref(y) exp( E_{y'~mu}[ Psi(p*(y>y')) ] / tau )                  (eq. 7)
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
    """The margin in nats that PsiPO's optimum has on pairs preferred with probability p. A tie, p = 1/2, asks for 0.

    The 1/2 is exact: one comparison, seen from both sides, says 1/tau and 0; their midpoint has the same regression.
    Raises ValueError unless tau > 0.
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
OBJECTIVE = {"ipo": lambda q: psi(q), "dpo": torch.logit}  # the Psi whose optimum the loss aims at (DPO: proposition 1)


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
    """The numbers of a log line. `win`: the share of pairs whose margin has the label's sign; ties, which are margins
    below the rounding of .0005 nats, count one half."""
    h = margin(logp, ref_logp)
    chosen, rejected = (logp - ref_logp).chunk(2)
    asked = target(p, args.tau).mean().item() if args.loss == "ipo" else None  # None: no finite target
    return {"loss": LOSSES[args.loss](h, p, args.tau).mean().item(), "h": h.mean().item(),
            "h_std": h.std(correction=0).item(), "target": asked, "chosen": chosen.mean().item(),
            "rejected": rejected.mean().item(), "win": ((h.round(decimals=3) * (p - 0.5)).sign().mean().item() + 1) / 2}


def score_pairs(model, pairs, args):  # -> (2N,)
    """log pi of the chosen, then of the rejected responses, without gradient or dropout."""
    return M.score(model, pairs, pairs.pair_rows(), 2 * args.batch_size, args.dtype, args.logp == "mean")


def distribution(model, world, args):  # -> (X,Y) float64
    """log pi(y|x) of every response to every prompt of a world: the whole policy, by enumeration."""
    rows = torch.arange(world.reward.numel())
    return M.score(model, world.data, rows, 2 * args.batch_size, args.dtype).view(world.reward.shape).double()


def theory(world, ref, args):  # log ref (X,Y) -> mu, log pi*, log of the fitted policy (None: pi* itself), (X,Y) each
    """The fitted policy is where IPO leads on labels of this kind: E[target] takes the place of Psi. It is pi* if the
    labels may stand for p* (soft ones, or an affine Psi without noise) and Psi is odd (a target sees no more)."""
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
                      "certain pairs, which is DPO's over-fitting; use labels with 0 < p < 1 (in the bt world --labels "
                      "soft) or a Psi that is finite at 0 and 1")


def check_start(model, pairs, ref_logp, args):
    """Step 0: pi = ref, so all margins are 0 and the loss is known. Raises Stopped if the cache is of another model."""
    pairs = pairs.select(torch.arange(min(args.batch_size, len(pairs.p))))
    ref, logp = ref_logp[pairs.pair_rows()], score_pairs(model, pairs, args)
    expected, measured = measure(ref, ref, pairs.p, args), measure(logp, ref, pairs.p, args)
    why = f"mean target^2; mean target {expected['target']:.4g} nats" if args.loss == "ipo" else "ln 2; no target"
    print(f"step 0: loss {measured['loss']:.6g}, theory {expected['loss']:.6g} ({why})")
    rounding = (2e-2 if args.dtype == "bfloat16" else 1e-5) * (1 + ref.abs().max())
    if not margin(logp, ref).abs().max() <= rounding:
        raise Stopped("step 0: margins are not 0, so the cached reference is not the policy that training starts from")


# --------------------------------------------------------------------------------------------------------------- output

def log_line(kind, step, args, n, extra=""):
    """One line of fixed width; the README says what the columns mean."""
    asked = "inf" if n["target"] is None else f"{n['target']:.2f}"
    tqdm.write(f"{kind} {step:4d}/{args.steps} | loss {n['loss']:8.4f} | h {n['h']:+.2f} ± {n['h_std']:.2f} -> {asked} "
               f"| chosen {n['chosen']:+.2f} rejected {n['rejected']:+.2f} | win {n['win']:.2f}{extra}", file=sys.stdout)


UNITS = {"kl_ref": "KL(pi||ref), nats", "kl_opt": "KL(pi||pi*), nats", "win": "win rate against mu",
         "objective": "objective J, of Psi", "ratio": "max |log pi/ref|, nats", "kl_fit": "KL(pi||labels'), nats"}


def print_report(report):
    """A row per exact quantity, a column per policy; `optimum` is what theory expects, - is what is not finite."""
    print(f"\n{'exact, mean over prompts':26}" + "".join(f"{column:>10}" for column in report))
    for key in report["after"]:
        print(f"{UNITS[key]:26}" + "".join("         -" if c[key] is None else f"{c[key]:10.4f}" for c in report.values()))
    if "kl_fit" in report["after"]:
        print("labels' = where this loss leads on these labels, not pi*: a coin flip may stand for p* only if Psi is\n"
              "affine and nothing flips it; a target sees Psi's odd part only. Try --labels soft, --noise 0, an odd Psi")
    if report["optimum"]["kl_ref"] is None:
        print("No finite optimum: certain pairs always ask this loss for more, so max |log pi/ref| grows with --steps.")


def continuation(model, prompt, tokenizer, args):
    """A text sampled after `prompt` (ids). Seed and prompt fix the draws, so two models' texts differ by the models."""
    generator = torch.Generator().manual_seed(args.seed + sum(prompt))
    return tokenizer.decode(M.generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k,
                                       tokenizer.eot_token, generator))


# ---------------------------------------------------------------------------------------------------------- the program

class Stopped(RuntimeError):
    """A run that must not go on; one line that says why."""


def prepare(args, generator):
    """(world or None, rows: a world's or the training pairs', held-out pairs or None, tokenizer, model on the CPU)."""
    saved, extra = M.load_checkpoint(args.init_from) if args.init_from else (None, {})
    world = held = None
    source = D.iter_jsonl(args.data) if args.task == "file" else None
    tokenizer = D.get_tokenizer(args.tokenizer or "world")
    if args.task == "world":
        world = D.build_world(args.data)
        data, config = world.data, M.GPTConfig(world.block_size, world.vocab_size, head_size=world.head_size)
    else:
        config = M.GPTConfig(saved.config.block_size if saved else args.block_size, tokenizer.n_vocab)
        data, held = D.split(D.encode(source, tokenizer, config.block_size), args.holdout, generator)
        print(f"data: {len(data.p):,} pairs to train on, {len(held.p):,} held out; no prompt is in both")
    if saved and extra.get("tokenizer") != tokenizer.name:
        raise D.Refused(f"--init_from {args.init_from}: its tokenizer is {extra.get('tokenizer')!r}, the data's is "
                        f"{tokenizer.name!r}; start from a run on the same kind of data, or choose its --tokenizer")
    vars(config).update({size: getattr(args, size) for size in ("n_layer", "n_head", "n_embd", "dropout")})
    model = (saved or M.GPT(config)).to(args.device)
    size = sum(p.numel() for p in model.parameters())
    if small := size < 1e6 and args.device == "cpu":
        torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
    print(f"model: {size:,} parameters, context {model.config.block_size} tokens; {args.device}, {args.dtype}, "
          f"{torch.get_num_threads()} CPU threads" + " (1 because the model is small)" * small)
    return world, data, held, tokenizer, model


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
    """SFT on what mu is made of, rejected responses too; the log-probs (R,) that are the reference from now on."""
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
    """The world's problem: (pairs drawn from it, a function that measures the model exactly, the optimum's numbers)."""
    ref = distribution(model, world, args)
    mu, best, fit = theory(world, ref, args)
    exact = lambda logp: D.exact(logp, ref, best, fit, world.pstar, mu, OBJECTIVE[args.loss], args.tau)
    print(f"world {world.name}: {ref.shape[0]} prompts x {ref.shape[1]} responses, whose probabilities sum to "
          f"{ref.exp().sum(-1).mean():.6f}; KL(base||ref) {D.base_kl(world.base, ref):.4f} nats\npairs: {args.pairs:,} "
          f"{args.labels}, each seen {args.steps * args.batch_size / args.pairs:.2f} times")
    pairs = world.draw(args.pairs, mu, args.labels, args.noise, generator)
    if args.loss == "ipo" and args.logp == "sum":  # hard labels are coin flips: no policy puts all margins at 1/(2 tau)
        final = best if fit is None else fit
        n = measure(*(z.flatten()[pairs.pair_rows()].float() for z in (final, ref)), pairs.p, args)
        print(f"expected at the end: loss {n['loss']:.4f}, h {n['h']:+.2f} ± {n['h_std']:.2f}, win {n['win']:.2f}")
    theirs = exact(best) if best.isfinite().all() else dict.fromkeys(exact(ref))
    return pairs, lambda: exact(distribution(model, world, args)), theirs


def run(args):
    """Reference, its cached log-probs, preference training, report. What lasts goes to --out."""
    torch.manual_seed(args.seed)
    generator, seconds, begin = torch.Generator().manual_seed(args.seed), {}, time.perf_counter()

    def lap(stage):  # charges the time since the last lap to a stage
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begin - sum(seconds.values())

    world, pairs, held, tokenizer, model = prepare(args, generator)
    check_targets(pairs.p if not world else world.pstar if args.labels == "soft" else torch.ones(1), args)
    open_folder(args)
    lap("setup")
    ref_logp = make_reference(model, world, pairs, args, generator)  # (R,)
    lap("reference")
    if world:
        pairs, evaluate, best = pose(model, world, args, generator)
        shown = pairs
    else:
        shown, kind = (held, "eval") if len(held.p) else (pairs, "eval of the training pairs")
        evaluate = lambda: measure(score_pairs(model, shown, args), ref_logp[shown.pair_rows()], shown.p, args)
    check_start(model, pairs, ref_logp, args)
    report, rows = {"before": evaluate()}, pairs.pair_rows()
    length = (pairs.start[rows + 1] - pairs.start[rows]).float().mean().item() * 2 * args.batch_size  # tokens in a step
    picked = [int(shown.chosen[(shown.prompt == x).nonzero()[0, 0]]) for x in shown.prompt.unique()[:3]]
    prompts = [pairs.prompt_ids(row) for row in picked]
    texts = [[continuation(model, x, tokenizer, args) for x in prompts]]
    lap("evaluation")

    with open(f"{args.out}/metrics.jsonl", "w", buffering=1) as metrics:  # 1: line by line
        def log(step, numbers):
            lap("training")
            now, extra = evaluate(), f" | {length * step / seconds['training'] / 1e3:.1f}k tok/s"
            if world:
                gap = "inf" if now["kl_opt"] is None else f"{now['kl_opt']:.4f}"
                extra = f" | KL {now['kl_ref']:.2f}, to pi* {gap}" + extra
            log_line("step", step, args, numbers, extra)
            if not world:
                log_line(kind, step, args, now)
            metrics.write(json.dumps({"step": step, "seconds": seconds["training"], **numbers, "eval": now}) + "\n")
            if not math.isfinite(numbers["loss"]):
                raise Stopped(f"step {step}: the loss is {numbers['loss']}; lower --lr ({args.out}/ref.pt is unharmed)")
            lap("evaluation")

        train(model, pairs, ref_logp, args, generator, log)
    M.save_checkpoint(f"{args.out}/ckpt.pt", model, tokenizer=tokenizer.name)
    report["after"] = evaluate()
    texts.append([continuation(model, x, tokenizer, args) for x in prompts])
    if world:
        print_report(report := report | {"optimum": best})
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
    print(args.sample + continuation(model.to(args.device), prompt, tokenizer, args))


def number(kind, low, high=math.inf, above=False):
    """A type for argparse: numbers from low (not itself, if `above`) to high."""
    def parse_number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or above and value == low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number {'>' if above else '>='} "
                                             f"{low:g}" + f" and <= {high:g}" * (high < math.inf))
        return value
    return parse_number


NA = None  # the flag means nothing for that task, and is refused
TASKS = {"world": "in a synthetic world", "file": "for a JSONL file", "sample": "with --sample"}
positive, natural, count = number(float, 0, above=True), number(int, 1), number(int, 0)
FLAGS = [  # flag, type or choices, its default in a world, for a file, for --sample; its meaning and unit
    ("data", str, "bt", NA, NA, f"a synthetic world ({', '.join(D.WORLDS)}) or a JSONL file of preference pairs"),
    ("sample", str, NA, NA, "", "print a continuation of this prompt by the finished run in --out; trains nothing"),
    ("out", str, "out", "out", "out", "folder of the run's files"),
    ("init_from", str, "", "", NA, "checkpoint to start from and stay near (a run's ref.pt or ckpt.pt); '': none"),
    ("loss", list(LOSSES), "ipo", "ipo", NA, "loss on the margin"),
    ("tau", positive, 0.2, 0.1, NA, "pull towards the reference, DPO's beta; the target margin is 1/(2 tau) nats"),
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
    ("seed", count, 0, 0, 0, "fixes weights, data, order and samples"),
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
        for flag in given.keys() & {"n_layer", "n_head", "n_embd", "block_size", "dropout"}:
            parser.error(f"--{flag} is fixed by the checkpoint of --init_from; leave it out")
    elif task != "sample" and args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}; change one of them")
    if args.noise and args.labels == "soft":
        parser.error("--noise flips hard labels and --labels soft has none; leave one of the two out")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = next(d for d in there if there[d]) if args.device == "auto" else args.device
    if not there[args.device]:
        parser.error(f"--device {args.device}: torch finds none on this machine; use --device auto")
    return args


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for bad input, with one line on standard error."""
    args = parse(argv)
    try:
        sample(args) if args.task == "sample" else run(args)
    except (D.Refused, M.BadCheckpoint, Stopped) as error:
        print(f"ipo.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, Stopped) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
