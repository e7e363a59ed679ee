"""nanoIPO: preference optimisation by IPO, on a world small enough to know the exact answer.

  objective  max_pi  E[ Psi(p*(y>y')) ] - tau KL(pi||ref),  y ~ pi, y' ~ mu      (Azar et al. 2023, eq. 6)
  optimum    pi*(y)  =  ref(y) exp( E_{y'~mu}[ Psi(p*(y>y')) ] / tau ) / Z       (eq. 7; Z normalises)
  margin     h       =  log pi(yw)/ref(yw) - log pi(yl)/ref(yl)                  (eq. 12)
  target(p)          =  ( Psi(p) - Psi(1-p) ) / (2 tau)       p = P(yw is preferred to yl)
  IPO                   ( h - target(p) )^2                   Psi(q) = q, p = 1: ( h - 1/(2 tau) )^2, eq. 17
  DPO                   -p log s(tau h) - (1-p) log s(-tau h) eq. 4; its beta is our tau

pi policy, ref frozen reference, mu where responses come from, yw / yl chosen / rejected response, s sigmoid.
Log-probs and margins are in nats; log pi(y) is a sum over the tokens of y. More tau: closer to ref.
Sizes: B pairs, R rows (a row is a prompt with one response), T tokens, V vocabulary, C channels, S scored
tokens, X prompts and Y responses of a world. Arrows on signatures are shapes: what goes in -> what comes out.

  python ipo.py --loss ipo                          a synthetic world: train, then measure the distance to pi*
  python ipo.py --sample "review of the pizza:"     sample from the finished run
  python ipo.py --data FILE.jsonl                   pairs of your own
  python ipo.py --data FILE.jsonl --init_from gpt2  ... and GPT-2's weights
"""
import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model
from data import Refused

# ================================== EXERCISE: what is a preference worth? ==================================


def psi(q):  # preference probabilities in [0,1], a tensor of any shape -> their worth, same shape
    # hard labels are coin flips and see psi(0), psi(1) alone: --labels soft; then compare kl_opt, kl_labels
    return q


# ============================================ END OF THE EXERCISE ==========================================


def target(p, tau):  # (B,) -> (B,)
    """The margin in nats that a pair asks for if its first response is preferred with probability p (tie: 0).

    Read in one order the pair asks h for Psi(p)/tau, in the other -h for Psi(1-p)/tau (if certain: h for
    1/tau, -h for 0). This is the mean of both, so its 1/2 is exact. Hard labels, the default, are recorded
    coin flips with p*: the winner stands first and p = 1 for every pair. With --labels soft p is p* itself.
    """
    return (psi(p) - psi(1 - p)) / (2 * tau)


def ipo_loss(h, p, tau):  # (B,), (B,) -> (B,)
    """Squared distance to the target (eq. 17 at p = 1), nats^2. Slope 2 (h - target): h is pulled back."""
    return (h - target(p, tau)) ** 2


def dpo_loss(h, p, tau):  # (B,), (B,) -> (B,)
    """Logistic loss (eq. 4 at p = 1). Slope -tau (p - s(tau h)): at p = 1 never 0, so h never stops."""
    return -p * F.logsigmoid(tau * h) - (1 - p) * F.logsigmoid(-tau * h)


LOSSES = {"ipo": ipo_loss, "dpo": dpo_loss}
# loss -> the Psi whose optimum it aims at; the lambda looks psi up when called, so that ipo.psi = f counts
WORTH = {"ipo": lambda q: psi(q), "dpo": torch.logit}


def sequence_logp(policy, tokens, mask, mean=False):  # (R,T), (R,T) -> (R,)
    """log pi(y|x) of each row in nats: the sum of the log-probs of the tokens where mask is 1 (response y).

    The probability of a whole response is a product, so its log is a SUM; mean=True divides by the number of
    response tokens, as other tools do and the paper does not. Differentiable; float32 under autocast, too.
    """
    assert mask.shape == tokens.shape, f"mask {mask.shape} and tokens {tokens.shape} differ in shape"
    assert not mask[:, 0].any(), "mask[:,0] must be 0: nothing precedes the first token to predict it"
    assert mask[:, 1:].any(1).all(), "a row has no response token to score"
    row, t = mask[:, 1:].nonzero(as_tuple=True)             # (S,), (S,) a scored token stands at t + 1 ...
    x = policy.hidden(tokens[:, :-1], mask[:, 1:])[row, t]  # (S,C) ... predicted at t: the shift by one
    # (hidden's second argument is no attention mask: it names the positions that are read, for speed only)

    def token_logp(x, ids):  # (S,C), (S,) -> (S,)
        logits = policy.head(x)  # (S,V)
        return logits.log_softmax(-1, dtype=torch.float32).gather(1, ids[:, None])[:, 0]

    logp = model.in_chunks(token_logp, x, tokens[row, t + 1])    # (S,) all of them, in pieces: less memory
    total = logp.new_zeros(len(tokens)).index_add(0, row, logp)  # (R,)
    return total / mask.sum(1) if mean else total


def margin(logp, ref_logp):  # (2B,), (2B,) -> (B,)
    """h: how much further, in nats, the policy moved towards the chosen than to the rejected response."""
    chosen, rejected = (logp - ref_logp).chunk(2)
    return chosen - rejected


# --------------------------------------------------------------------------------------------------- training

class Stopped(RuntimeError):
    """A run that must not go on, in one line."""


def autocast(args):
    """Context: matrix products in --dtype; weights, log-probs and losses stay float32."""
    # CPUs obey, too, despite the name: their flash attention is slow in bfloat16, plain products are not
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu" or args.dtype == "float32")
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def adamw(policy):
    """No weight decay: it would pull to 0, not to the reference."""
    return torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def descend(policy, optimizer, step, steps, peak):
    """A step on the gradients that are there, their norm at most 1. The learning rate rises for 50 steps, or
    half of all, to its peak, then falls linearly towards 0."""
    warmup = min(50, steps // 2)
    for group in optimizer.param_groups:
        group["lr"] = peak * min(step / (warmup + 1), (steps - step + 1) / (steps - warmup))
    if not torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).isfinite():
        raise Stopped(f"step {step}: loss or gradient is not finite; lower --lr or --sft_lr (or raise --tau)")
    optimizer.step()
    optimizer.zero_grad()


def finetune(policy, source, args, generator):
    """SFT: maximum likelihood on rows of the source (see above WorldSource): this makes the reference."""
    optimizer, n = adamw(policy), 2 * args.batch_size
    rows = source.sft_rows(n * args.sft_steps, generator)
    for step, index in enumerate(data.batches(len(rows), n, args.sft_steps, generator), 1):
        tokens, mask = source.pairs.padded(rows[index], args.device)
        with autocast(args):
            loss = -sequence_logp(policy, tokens, mask).sum() / mask.sum()  # () nats per response token
        loss.backward()
        descend(policy, optimizer, step, args.sft_steps, args.sft_lr)
        if step in (1, args.sft_steps):
            print(f"sft  {step:5d}/{args.sft_steps} | loss {loss:8.4f} nats per response token", flush=True)


@torch.no_grad()
def score(policy, pairs, rows, args, mean=False):  # (R,) -> (R,), on the CPU
    """log pi(y|x) of these rows of a PairData, in nats, computed as the loop does."""
    logp = torch.zeros(len(rows))
    order = (pairs.prompt_len[rows] * len(pairs.start) + rows).argsort()  # by prompt's length; pairs together
    for part in order.split(8 * args.batch_size):
        tokens, mask = pairs.padded(rows[part], args.device)
        with autocast(args):
            logp[part] = sequence_logp(policy, tokens, mask, mean).cpu()
    return logp


def offline(source, ref_logp, args, generator):
    """Yields (Batch, its reference log-probs (2B,)): pairs in random order, the reference looked up."""
    for index in data.batches(len(source.train), args.batch_size, args.steps, generator):
        these = source.train[index]
        yield source.pairs.batch(these, args.device), ref_logp[source.pairs.pair_rows(these)].to(args.device)


def train(policy, batches, args, evaluate=lambda policy: {}):
    """Preference training on `batches`, an iterable of (Batch, its reference log-probs (2B,)), however made.

    evaluate(policy) -> numbers by name, for the log. Leaves ckpt.pt and metrics.jsonl in --out; --resume goes
    on from there and skips the batches that were seen. Raises Stopped if pi starts elsewhere than at ref.
    """
    optimizer, path, state = adamw(policy), f"{args.out}/ckpt.pt", {"step": 0, "lines": []}
    if args.resume and os.path.exists(path):
        _, state = model.load(path, policy, optimizer)
        print(f"resumed after step {state['step']}")
    begin, lines = state["step"], state["lines"]
    for step, (batch, ref_logp) in enumerate(itertools.islice(batches, begin, args.steps), begin + 1):
        with autocast(args):
            logp = sequence_logp(policy, batch.tokens, batch.mask, args.logp == "mean")  # (2B,)
        h = margin(logp, ref_logp)                                                       # (B,)
        loss = LOSSES[args.loss](h, batch.p, args.tau).mean()                            # ()
        if step == 1:
            check_start(h, loss, logp, batch.p, args)
        loss.backward()
        descend(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            numbers = measure(logp.detach(), ref_logp, batch.p, args)  # of the batch, before its update
            lines.append({"step": step, "batch": numbers, "eval": evaluate(policy)})
            print(log_line(args.steps, **lines[-1]), flush=True)
            Path(f"{args.out}/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            model.save(path, policy, tokenizer=args.tokenizer, step=step, lines=lines,
                       optimizer=optimizer.state_dict())


# ------------------------------------------------------------------------------------------------ measurement

def no_worth(q):
    """The Psi of a loss that WORTH does not list: unknown."""
    return q * torch.nan


def measure(logp, ref_logp, p, args):  # (2B,), (2B,), (B,) -> numbers by name
    """Means over pairs, in nats but for accuracy: the share of margins with the label's sign; ties (p = 1/2,
    or |h| < .0005, perhaps rounding) count one half. None: infinite (DPO's target at p = 1) or unknown."""
    h = margin(logp, ref_logp)
    chosen, rejected = (logp - ref_logp).chunk(2)
    worth = WORTH.get(args.loss, no_worth)
    values = {"loss": LOSSES[args.loss](h, p, args.tau), "h": h, "h_std": h.std(correction=0),
              "target": (worth(p) - worth(1 - p)) / (2 * args.tau), "chosen": chosen, "rejected": rejected,
              "accuracy": 0.5 + (h.round(decimals=3) * (p - 0.5)).sign() / 2}
    return data.finite({name: value.mean() for name, value in values.items()})


def show(value):
    """A number for people (z: no -0.0000); - for None."""
    return "-" if value is None else f"{value:z.4f}"


def log_line(steps, step, batch, eval):
    """One line: the batch before its update, then what `evaluate` says of the policy after it: in a world
    both KLs, for a file h and accuracy."""
    names = {"kl_ref": "KL", "kl_opt": "to pi*", "h": "eval h", "accuracy": "acc"}
    known = [f"{name} {show(eval[key])}" for key, name in names.items() if key in eval]
    return (f"step {step:5d}/{steps} | loss {batch['loss']:8.4f} | h {batch['h']:+6.2f} ± "
            f"{batch['h_std']:5.2f} -> {show(batch['target'])} | chosen {batch['chosen']:+6.2f} "
            f"rejected {batch['rejected']:+6.2f} | acc {batch['accuracy']:.2f} | {', '.join(known[:2])}")


def print_report(report):
    """A row per number, a column per policy."""
    print("\n" + " " * 12 + "".join(f"{column:>10}" for column in report))
    for key in report["before"]:
        print(f"{key:12}" + "".join(f"{show(column[key]):>10}" for column in report.values()))


def check_start(h, loss, logp, p, args):
    """Step 0: pi = ref, so margins are 0, or the cache is wrong: Stopped. The loss then is what it is at
    h = 0, for eq. 17 1/(4 tau^2); compare. Raises Refused if that is infinite."""
    theory = LOSSES[args.loss](torch.zeros_like(h), p, args.tau).mean()
    if not theory.isfinite():
        raise Refused("infinite margin at p = 1, DPO's over-fitting; use --labels soft or another psi")
    print(f"\nstep 0: loss {loss:.6g}, theory {theory:.6g} (the loss at h = 0)")
    if not h.abs().max() <= (2e-2 if args.dtype == "bfloat16" else 1e-5) * (1 + logp.abs().max()):  # rounding
        raise Stopped(f"step 0: margins up to {h.abs().max():.3g} nats, not 0: the reference is not pi")


# A source has pairs (a PairData), tokenizer, sizes (GPTConfig's first three), prompts to sample from (ids),
# sft_rows(n, generator). Once the reference is ready pose(policy, ref_logp, generator) is called; then it has
# train (N,), the pairs to train on, evaluate(policy) -> numbers, exact {column: log-probs for numbers()}.

class WorldSource(data.World):
    """A synthetic world: pairs, and how far a policy, as its log-probs (X,Y), is from the exact optimum."""

    def __init__(self, args):
        super().__init__(args.data)
        self.args = args

    def enumerate(self, policy):  # -> (X,Y)
        """log pi(y|x) of every response: the whole policy. A sum, also under --logp mean."""
        logp = score(policy, self.pairs, torch.arange(self.reward.numel()), self.args)
        return logp.view_as(self.reward).double()

    def pose(self, policy, ref_logp, generator):
        """Sets what the reference fixes (ref_logp, perhaps of means, is not needed): ref, mu, pairs, and in
        exact "opt": pi* (eq. 7); "labels": where endless labels of this kind lead, ref exp(E_mu E[target])
        normalised. They differ with --noise, if Psi(q) + Psi(1-q) is not constant, or, with hard labels, if
        Psi is not affine."""
        args, self.ref = self.args, self.enumerate(policy)
        uniform = torch.full_like(self.ref, 1 / len(self.responses))  # EXERCISE: another mu; rows sum to 1
        self.mu = uniform if args.mu == "uniform" else self.ref.exp()
        self.draw(args.pairs, self.mu, args.labels, args.noise, generator)
        self.train, self.worth = torch.arange(args.pairs), WORTH.get(args.loss, no_worth)
        self.exact = {"opt": data.optimum(self.ref, self.worth(self.pstar), self.mu, args.tau)}
        if args.loss == "ipo" and args.logp == "sum":
            q = self.pstar + args.noise * (1 - 2 * self.pstar)  # (X,Y,Y) P(the label says y)
            certain = target(torch.ones_like(q), args.tau)  # a coin flip asks for this or, lost, for -this
            asked = target(q, args.tau) if args.labels == "soft" else (2 * q - 1) * certain
            self.exact["labels"] = data.optimum(self.ref, asked, self.mu, 1.0)  # asked is in nats: no tau
        known = "" if args.loss in WORTH else "; pi* is unknown: ipo.WORTH has no Psi for this loss"
        print(f"world {args.data}: {args.pairs:,} {args.labels} pairs, mu {args.mu}{known}")

    def numbers(self, logp):  # (X,Y) -> numbers by name
        """Means over all pairs (not under --logp mean: logp is a sum), then the exact ones."""
        # log pi/ref already, so that measure's reference is 0
        ratios = (logp - self.ref).flatten()[self.pairs.pair_rows(self.train)].float()
        n = measure(ratios, torch.zeros(()), self.pairs.p, self.args) if self.args.logp == "sum" else {}
        return n | data.exact(logp, self.ref, self.exact, self.pstar, self.mu, self.worth, self.args.tau)

    def evaluate(self, policy):
        return self.numbers(self.enumerate(policy))


class FileSource:
    """Pairs of a JSONL file, or any iterable of Pair: some to train on, some held out, no prompt in both."""

    def __init__(self, args, tokenizer=None, pairs=None):
        self.args, self.exact = args, {}
        self.tokenizer = tokenizer or data.get_tokenizer(args.tokenizer)
        self.pairs = data.encode(pairs or data.read_jsonl(args.data), self.tokenizer, args.block_size)
        self.sizes = args.block_size, self.tokenizer.n_vocab, 0
        self.train, held = data.split(self.pairs, args.holdout, torch.Generator().manual_seed(args.seed))
        print(f"data: {len(self.train):,} pairs to train on, {len(held):,} held out (0: eval is of all)")
        self.eval = held if len(held) else self.train
        self.rows = self.pairs.pair_rows(self.eval)
        self.prompts = [self.pairs.prompt_ids(row) for row in self.rows[:3]]

    def sft_rows(self, n, generator):
        return self.pairs.pair_rows(self.train)

    def pose(self, policy, ref_logp, generator):
        self.ref = ref_logp[self.rows]

    def evaluate(self, policy):
        logp = score(policy, self.pairs, self.rows, self.args, self.args.logp == "mean")
        return measure(logp, self.ref, self.pairs.p[self.eval], self.args)


# ------------------------------------------------------------------------------------------------ the program

FOR_A_FILE = {"tau": 0.1, "steps": 200, "batch_size": 16, "lr": 1e-4, "sft_steps": 400, "sft_lr": 1e-3,
              "log_every": 50, "n_layer": 4, "n_embd": 128}  # where a world's defaults do not suit


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(message)


def flags():
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    text = f"{__doc__}\nIn brackets: a world's defaults; a file's: {FOR_A_FILE}; --init_from: sft_steps 0."
    parser = Parser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(flag, default, meaning, **more):
        parser.add_argument(flag, default=default, type=type(default), help=f"{meaning} [{default}]", **more)

    add_argument("--loss", "ipo", "loss on the margin", choices=LOSSES)
    add_argument("--tau", 0.2, "pull to the reference, DPO's beta; IPO asks certain pairs for 1/(2 tau)")
    add_argument("--data", "bt", f"a world ({', '.join(data.WORLDS)}) or a JSONL file of preference pairs")
    add_argument("--init_from", "", "start from a run's .pt, or from a folder or hub id of GPT-2; '': random")
    add_argument("--out", "out", "folder of the run's files")
    add_argument("--logp", "sum", "over a response's tokens; the paper's is the sum", choices=["sum", "mean"])
    add_argument("--labels", "hard", "world: coin flips with p*, or p* itself", choices=["hard", "soft"])
    add_argument("--noise", 0.0, "world: probability that a label is flipped")
    add_argument("--mu", "uniform", "world: where responses come from", choices=["uniform", "ref"])
    add_argument("--pairs", 500_000, "world: pairs to draw")
    add_argument("--tokenizer", "gpt2", "file: gpt2, or bytes, which needs no network")
    add_argument("--holdout", 0.1, "file: share of the prompts that is held out")
    add_argument("--block_size", 256, "file: context in tokens")
    add_argument("--steps", 2000, "steps of preference training")
    add_argument("--batch_size", 256, "pairs in a step")
    add_argument("--lr", 1.5e-3, "peak learning rate")
    add_argument("--sft_steps", 200, "maximum-likelihood steps that make the reference")
    add_argument("--sft_lr", 3e-3, "their peak learning rate")
    add_argument("--log_every", 200, "steps from one log line and checkpoint to the next")
    add_argument("--n_layer", 1, "blocks")
    add_argument("--n_head", 4, "attention heads")
    add_argument("--n_embd", 32, "channels, a multiple of n_head")
    add_argument("--device", device, "where tensors live", choices={"cpu", device})
    add_argument("--dtype", "float32", "of matrix products", choices=["float32", "bfloat16"])
    add_argument("--seed", 0, "fixes weights, pairs, order and samples")
    add_argument("--sample", "", "a prompt: no training, print what the policy in --out or --init_from says")
    add_argument("--temperature", 1.0, "of samples; 0 takes the likeliest token")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its flags")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return parser


def parse(argv=None):
    """The flags of a run, checked. Raises Refused."""
    parser = flags()
    given = parser.parse_args(argv)  # once to learn which defaults hold, below once more with them
    if given.data not in data.WORLDS:
        parser.set_defaults(**FOR_A_FILE)
    if given.init_from:
        parser.set_defaults(sft_steps=0)
    saved = saved_flags(given.out) if given.resume else {}
    parser.set_defaults(**saved)
    argv = ["--loss", saved.get("loss", "ipo"), *(argv or sys.argv[1:])] if saved else argv  # to be checked
    args = parser.parse_args(argv)
    for flag, value in vars(args).items():
        if flag in saved and saved[flag] != value:
            raise Refused(f"--{flag} {value} contradicts the run in {args.out}/: {saved[flag]}; leave it out")
        low = 0 if flag in ("noise", "holdout", "sft_steps", "seed", "temperature") else 1e-9
        high = 1 if flag in ("noise", "holdout") else 1e9
        if type(value) in (int, float) and not low <= value <= high:
            raise Refused(f"--{flag} {value} is out of range; give a number from {low:g} to {high:g}")
    return args


def saved_flags(out):
    """The flags of the run in this folder."""
    try:
        return dict(json.loads(Path(f"{out}/config.json").read_text())) | {"out": out}
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{out}/config.json is not that of a run ({error}); name the --out of one") from None


def claim(args):
    """Makes --out ready and writes the flags there. Raises Refused if a run would be lost."""
    os.makedirs(args.out, exist_ok=True)
    files = {"ref.pt", "ckpt.pt", "metrics.jsonl", "report.json"} & set(os.listdir(args.out))
    if files and not args.resume:
        again = "report.json" in files and saved_flags(args.out).get("data") in data.WORLDS
        if not again and not args.overwrite:
            raise Refused(f"--out {args.out} holds a run: --resume it, --overwrite it or name another --out")
        print(f"{args.out}/: the run that was there is replaced")
        for name in files:
            os.remove(f"{args.out}/{name}")
    # so that --resume does not contradict itself
    Path(f"{args.out}/config.json").write_text(json.dumps(vars(args) | {"resume": True, "overwrite": False}))


def sample(args):
    """--sample: the prompt, and what the policy says after it."""
    policy, saved = model.load(args.init_from or f"{args.out}/ckpt.pt")
    tokenizer = data.get_tokenizer(saved.get("tokenizer", args.tokenizer))
    prompt = tokenizer.encode_ordinary(args.sample)
    print(args.sample + model.generate(policy, tokenizer, prompt, args.temperature, args.seed))


def run(args, policy=None, source=None):
    """One run of one loss: source, policy, reference, training, report. policy and source may be your own."""
    torch.manual_seed(args.seed)
    generator, path, saved = torch.Generator().manual_seed(args.seed), f"{args.out}/ref.pt", {}
    resumed = args.resume and os.path.exists(path)
    loaded = resumed or args.init_from and not policy
    if loaded:
        policy, saved = model.load(path if resumed else args.init_from, policy)
        args.tokenizer, args.block_size = saved.get("tokenizer", args.tokenizer), policy.config.block_size
    source = source or (WorldSource(args) if args.data in data.WORLDS else FileSource(args))
    if loaded and (args.tokenizer != source.tokenizer.name or policy.config.vocab_size < source.sizes[1]):
        raise Refused(f"--init_from {args.init_from}: its model knows other words than --data {args.data}")
    policy = policy or model.GPT(model.GPTConfig(*source.sizes, args.n_layer, args.n_head, args.n_embd))
    policy.to(args.device)
    claim(args)
    args.tokenizer = source.tokenizer.name
    size = sum(p.numel() for p in policy.parameters())
    if size < 1e6 and args.device == "cpu":
        torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
    print(f"model: {size:,} parameters; {args.device}, {torch.get_num_threads()} CPU threads")
    if resumed:
        ref_logp = saved["ref_logp"]
        generator.set_state(saved["generator"])
    else:
        finetune(policy, source, args, generator)
        rows = torch.arange(len(source.pairs.prompt_len))
        ref_logp = score(policy, source.pairs, rows, args, args.logp == "mean")  # (R,) from now on a cache
        model.save(path, policy, tokenizer=args.tokenizer, ref_logp=ref_logp, generator=generator.get_state())
    source.pose(policy, ref_logp, generator)
    report = {name: source.numbers(logp) for name, logp in source.exact.items()}
    report["before"] = source.evaluate(policy)
    print_report(report)
    train(policy, offline(source, ref_logp, args, generator), args, source.evaluate)
    report["after"] = source.evaluate(policy)
    print_report(report)
    for prompt in source.prompts:
        text = model.generate(policy, source.tokenizer, prompt, args.temperature, args.seed)
        print(f"{source.tokenizer.decode(prompt)[-99:]!r} -> {text!r}")
    Path(f"{args.out}/report.json").write_text(json.dumps(report, indent=1))


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for unusable input; one line on stderr."""
    try:
        args = parse(argv)
        sample(args) if args.sample else run(args)
        return 0
    except (Refused, model.Refused, Stopped, OSError, KeyboardInterrupt) as error:
        print("ipo.py:", str(error) or "interrupted; --resume goes on where it was saved", file=sys.stderr)
        return 2 if isinstance(error, (Refused, model.Refused, FileExistsError, NotADirectoryError)) else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or pipe may lack a sample's characters
    sys.exit(main())
