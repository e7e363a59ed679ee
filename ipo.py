"""nanoIPO: identity preference optimisation (IPO), in a world so small that the exact answer is known.

  objective  max_pi  E[ Psi(p*(y>y')) ] - tau KL(pi||ref),  y ~ pi, y' ~ mu      (Azar et al. 2023, eq. 6)
  optimum    pi*(y)  =  ref(y) exp( g(y) / tau ) / Z,  g(y) = E_{y'~mu}[ Psi(p*(y>y')) ]           (eq. 7)
  margin     h       =  log pi(yw)/ref(yw) - log pi(yl)/ref(yl)                                   (eq. 12)
  IPO        ( h - target(p) )^2,  target(p) = ( Psi(p) - Psi(1-p) ) / (2 tau)
             with Psi(q) = q and p = 1 that is ( h - 1/(2 tau) )^2                                (eq. 17)
  DPO        -log s(tau h) for p = 1; its beta is our tau                  (Rafailov et al. 2023, their eq. 7)

README.md explains the words, and derives the target. yw is a pair's chosen response and yl the rejected one.
p is the label, the probability that yw wins.

  python ipo.py --loss ipo                          the toy world: train, then measure the distance to pi*
  python ipo.py --sample "pizza review:"            what the trained policy says
  python ipo.py --data FILE.jsonl                   pairs of your own
  python ipo.py --data FILE.jsonl --init_from gpt2  ... and GPT-2's weights

Sizes: B pairs, R rows (a row is a prompt with one response), T tokens in a row. The comment after a
signature, such as (R,T) -> (R,), gives the shapes that go in and come out.
"""
import argparse
import json
import os
import sys

import torch
from torch.nn.functional import logsigmoid

import data
import model
from data import Refused  # bad input, in one line

# ==================================== EXERCISE: what is a preference worth? ================================


def psi(q):
    """The worth of being preferred with probability q. q: a tensor of any shape; returns the same shape.

    Try another one with --labels soft. Then training ends at pi* if psi(q) + psi(1 - q) is the same for all q
    (README.md). By default p is 1 in each pair, so training sees psi(1) - psi(0) and nothing else of psi.
    """
    return q


# ============================================ END OF THE EXERCISE ==========================================


def target(p, tau):  # (B,) -> (B,)
    """The margin, in nats, that is asked of a pair if its chosen response is preferred with probability p.

    target(1 - p) is -target(p). So if the two responses change places, which makes h to -h, the loss stays.
    """
    return (psi(p) - psi(1 - p)) / (2 * tau)


def ipo_loss(h, p, tau):  # (B,), (B,) -> (B,)
    """Squared distance to the target, nats^2."""
    return (h - target(p, tau)) ** 2


def dpo_loss(h, p, tau):  # (B,), (B,) -> (B,)
    """-log s(tau h) if p is 1. In general its mean over flips of a coin with p, as a lost flip swaps the two.

    In h log s(tau h) has the slope tau (1 - a), with a = s(tau h), and log s(-tau h) the slope -tau a. So
    this loss has the slope -tau (p (1 - a) - (1 - p) a) = tau (a - p). It is 0 where a = p, which is
    tau h = logit(p). At p = 1 it never is. A response that loses some pairs is held back by these. One that
    always wins rises for ever.
    """
    return -(p * logsigmoid(tau * h)
             + (1 - p) * logsigmoid(-tau * h))


LOSSES = {"ipo": ipo_loss, "dpo": dpo_loss}


def sequence_logp(policy, tokens, mask):  # (R,T), (R,T) -> (R,)
    """log pi(y|x) of each row, in nats: the sum of the log-probs of the tokens where the mask is True.

    The token at position t + 1 is predicted at position t:
        position          0   1   2   3
        tokens            x0  x1  y2  y3    a prompt of two tokens, a response of two
        mask              0   0   1   1
        predicted there   x1  y2  y3
        scored            0   1   1         the mask without its first column
    Padding on the right has the mask 0, too. S counts the ones in `scored` of all rows. policy.hidden gives C
    channels at each position, and policy.head makes V logits of them, for the ids that it can emit.
    """
    device = next(policy.parameters()).device
    tokens, mask = tokens.to(device), mask.to(device)
    scored = mask[:, 1:]                                         # (R,T-1)
    # skip this: rows of over 16 tokens (the toy world's have 5) get the same x faster, but for rounding
    if model.sharing_pays(policy, tokens):
        x = model.shared_hidden(policy, tokens[:, :-1], scored)  # (S,C)
    else:
        x = policy.hidden(tokens[:, :-1])[scored]                # (S,C) the scored positions, row by row
    logp = policy.head(x).float().log_softmax(-1)                # (S,V)
    said = tokens[:, 1:][scored]                                 # (S,) the tokens of the responses
    token_logp = logp.new_zeros(scored.shape)                    # (R,T-1)
    # back to their places, row by row as they were taken, so that rows can be summed; autograd follows
    token_logp[scored] = logp.gather(1, said[:, None]).squeeze(1)
    return token_logp.sum(1).cpu()  # where p and ref_logp are


def margin(logp, ref_logp):  # (2B,), (2B,) -> (B,)
    """h of each pair: by how many nats more its chosen response has risen than its rejected one."""
    chosen, rejected = (logp - ref_logp).chunk(2)  # rows 0..B-1 are chosen, rows B..2B-1 rejected
    return chosen - rejected


# ------------------------------------------------------------------------------------------------- training

class Stopped(Refused):
    """A run that must not go on: exit status 1. (Any other Refused is bad input: 2.)"""


def precision(args):
    """With --dtype bfloat16 matrix products are made in bfloat16. Weights and losses stay float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def adam(policy):
    """Adam; optimizer_step sets its rate.

    The usual second beta, .999, would average squared gradients over 1000 steps, half of a toy run.
    """
    return torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99), fused=True)


def optimizer_step(optimizer, step, steps, peak):
    """One step, with the gradient's norm clipped to 1.

    The learning rate is `peak` times `rising`, a warm-up, times `falling`, a line from 1 to 1/steps.
    """
    rising = min(step / min(50, steps / 2), 1)
    falling = 1 - (step - 1) / steps
    group = optimizer.param_groups[0]  # there is one, with all weights
    group["lr"] = peak * rising * falling
    norm = torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    if not norm.isfinite():
        raise Stopped("the loss or its gradient is not finite; lower --lr or --sft_lr, or raise --tau")
    optimizer.step()
    optimizer.zero_grad()


def train(policy, batches, args, evaluate):
    """Preference training. Returns the log, a list of dicts. Raises Stopped.

    batches: any iterable of data.Batch, which has tokens, mask, p and ref_logp. At each log line
    evaluate(policy) gives numbers by name (h need not be there), and ckpt.pt is saved. A resumed run skips
    the batches up to its step.
    """
    optimizer = adam(policy)
    # a new run has no ckpt.pt: 0, []; a resumed one: its step and log, and policy and optimizer are restored
    seen, log = last_checkpoint(policy, optimizer, args)
    for step, batch in enumerate(batches, 1):
        if step <= seen:  # its effect is in ckpt.pt
            continue
        with precision(args):
            logp = sequence_logp(policy, batch.tokens, batch.mask)  # (2B,)
        h = margin(logp, batch.ref_logp)                            # (B,)
        loss = LOSSES[args.loss](h, batch.p, args.tau).mean()       # ()
        if step == 1:  # before it: prints "step 0", and stops if a margin is not 0
            check_start(policy, batch, logp, loss)
        loss.backward()
        optimizer_step(optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            numbers = {"batch loss": loss.item(), **evaluate(policy)}
            if numbers.get("h", 0) is None:  # `means` made it None: NaN, or over 10,000
                raise Stopped(f"step {step}: h is not finite, or over 10,000 nats; lower --lr")
            told(f"step {step}/{args.steps}", numbers)
            log.append({"step": step, **numbers})
            model.save(f"{args.out}/ckpt.pt", policy, args,
                       step=step, log=log, optimizer=optimizer.state_dict())
    return log


# ------------------------------------------------------------------------------------------ around the loop

def generator(args, number):
    """Random numbers for one use, so that a resumed run draws what it drew before.

    number: 0 for SFT, 1 for the order of the pairs, 2 for the world's pairs. Others are free for your code.
    """
    return torch.Generator().manual_seed(10 * args.seed + number)


# A source is where the pairs come from: WorldSource or FileSource, further down. This part takes of it
#   pairs       a data.PairData
#   train       the indices of the pairs to train on
#   sft_weight  (R,) how often SFT takes each row
# and `run` also evaluate, set_reference, exact (with numbers, unless it is {}), tokenizer and sizes.

def finetune(policy, source, args):
    """SFT: raises the likelihood of rows of the source. The result is the reference."""
    optimizer, random = adam(policy), generator(args, 0)
    for step in range(1, args.sft_steps + 1):
        # as many rows as a preference step has; True: with replacement
        rows = torch.multinomial(source.sft_weight, 2 * args.batch_size, True, generator=random)
        tokens, mask = source.pairs.padded(rows)
        with precision(args):
            logp = sequence_logp(policy, tokens, mask)  # (2B,)
        loss = -logp.sum() / mask.sum()                 # () nats per token of the whole batch
        loss.backward()
        optimizer_step(optimizer, step, args.sft_steps, args.sft_lr)
        if step % args.log_every == 0:
            told(f"SFT {step}/{args.sft_steps}", {"loss per token": loss})


@torch.no_grad()
def score(policy, pairs, args, which=slice(None)):  # -> (R,), or (K,) of K rows
    """log pi(y|x) of all rows of a PairData, or of `which` of them, in nats; 2B at a time, as in training."""
    rows = torch.arange(len(pairs.length))[which]
    with precision(args):
        logp = [sequence_logp(policy, *pairs.padded(part))
                for part in rows.split(2 * args.batch_size)]
    return torch.cat(logp)


def shuffled_batches(source, args):
    """Yields the Batch of each step: all pairs in random order, then in another, and so on."""
    for index in data.shuffled(len(source.train), args.batch_size,
                               args.steps, generator(args, 1)):
        yield source.pairs.batch(source.train[index])


def last_checkpoint(policy, optimizer, args):
    """(step, log) of the run's ckpt.pt, whose weights and optimiser it restores; (0, []) if there is none.

    Refused unless its flags are this run's (at_present says which may differ) and it has a step. A ref.pt
    that was copied to its place has none.
    """
    path = f"{args.out}/ckpt.pt"
    if not os.path.exists(path):
        return 0, []
    saved = model.read(path)
    if at_present(saved["flags"], args) != vars(args) or "step" not in saved:
        raise Refused(f"{path} is of another run than ref.pt beside it; remove it, then --resume")
    model.restore(policy, saved)
    optimizer.load_state_dict(saved["optimizer"])
    print(f"resumed after step {saved['step']}")
    return saved["step"], saved["log"]


@torch.no_grad()
def check_start(policy, batch, logp, loss):
    """Before the first step the policy is the reference, so every margin is 0, but for rounding.

    In another batch the same row may have other sums. A margin has four log-probs, of two responses by policy
    and reference. In bfloat16 each may be off by `rounding`, which a second pass in float32 measures. In
    float32 that is 0, and .01 nats are allowed.
    """
    exact = sequence_logp(policy, batch.tokens, batch.mask)  # outside of `precision`, so in float32
    rounding = (logp - exact).abs().max()
    largest = margin(logp, batch.ref_logp).abs().max()
    print(f"step 0: loss {loss:.6g}, largest margin {largest:.1g} nats")
    if not largest <= 4 * rounding + 0.01:  # not >, which would let a NaN pass
        raise Stopped("before the first step a margin is not 0: ref_logp is not this policy's; begin anew")


# ---------------------------------------------------------------------------------------------- measurement

def pair_numbers(logp, ref_logp, p, args):  # (2B,), (2B,), (B,) -> numbers by name
    """Means over pairs: the loss; in nats h, and log pi/ref of the chosen and of the rejected response.

    accuracy: 1 if h has the sign of p - 1/2, which is whom the label favours; 0 if it has the other; 1/2 if
    one of them is 0.
    """
    # a world's log-probs are float64, which would take twice the time
    chosen, rejected = (logp - ref_logp).float().chunk(2)
    h = chosen - rejected
    return means({
        "loss": LOSSES[args.loss](h, p, args.tau),
        "h": h,
        "chosen": chosen,
        "rejected": rejected,
        "accuracy": (h * (p - 0.5)).sign() / 2 + 0.5,
    })


def means(values):
    """{name: tensor} -> {name: its mean}, None if that is NaN or over 10,000 (as DPO's optimum may be)."""
    values = {name: value.mean().item() for name, value in values.items()}
    return {name: value if abs(value) < 1e4 else None for name, value in values.items()}


def told(name, numbers):
    """Prints one line: a name, then every number with its own; - for None. (z: no -0.0000)"""
    cells = [f"{key} {'-' if value is None else f'{value:z.4f}'}" for key, value in numbers.items()]
    print(f"{name:14}", *cells, sep="  ", flush=True)


# ---------------------------------------------------------------------------------- where the pairs come from

# the Psi whose pi* a run with this loss is compared with (a lambda, since psi may be replaced)
PSI_OF = {"ipo": lambda q: psi(q), "dpo": torch.logit}


class WorldSource(data.World):
    """The toy world, its exact optimum, and how far a policy is from it."""

    def __init__(self, args):
        super().__init__(args.data)
        self.args = args
        self.train = torch.arange(args.pairs)
        self.sft_weight = self.base.repeat(len(data.SUBJECTS))  # (R,) how often SFT takes a row
        # a stand-in until the pairs are drawn: the values that p may take, for refuse_what_cannot_run
        self.pairs.p = torch.ones(1) if args.labels == "hard" else self.pstar

    def set_reference(self, ref_logp):  # (R,)
        """Draws the pairs, and computes the optimum pi* if PSI_OF has the loss."""
        args = self.args
        self.pairs.ref_logp = ref_logp
        ref = ref_logp.view_as(self.reward).double()  # (X,Y)
        uniform = torch.full_like(ref, 1 / len(self.responses))  # EXERCISE: another mu; rows sum to 1
        self.mu = uniform if args.mu == "uniform" else ref.exp()
        self.draw(args.pairs, self.mu, args.labels, generator(args, 2))
        # known policies: each has a line in the report, and a kl_ column
        self.exact = {"ref": ref}
        if args.loss in PSI_OF:
            worth = PSI_OF[args.loss](self.pstar)  # (X,Y,Y)
            self.exact["opt"] = data.optimum(ref, worth, self.mu, args.tau)

    def table(self, policy):  # -> (X,Y)
        """log pi(y|x) of every response: the whole policy."""
        return score(policy, self.pairs, self.args).view_as(self.reward).double()

    def numbers(self, logp):  # (X,Y) -> numbers by name
        """Means over the training pairs; then kl_ref = KL(pi||ref) and kl_opt = KL(pi||pi*), exact sums."""
        rows = self.pairs.pair_rows(self.train)  # train is all pairs
        numbers = pair_numbers(logp.flatten()[rows], self.pairs.ref_logp[rows],
                               self.pairs.p, self.args)
        return numbers | means({f"kl_{name}": data.kl(logp, other)
                                for name, other in self.exact.items()})

    def evaluate(self, policy):
        return self.numbers(self.table(policy))


class FileSource:
    """Pairs of a JSONL file, or a list of data.Pair: some to train on, some held out, no prompt in both.

    With --holdout 0 all are for training, and all are evaluated.
    """
    exact = {}  # no policy is known

    def __init__(self, args, tokenizer=None, pairs=None):
        self.args = args
        self.tokenizer = tokenizer or data.get_tokenizer(args.tokenizer)
        self.pairs = data.encode(pairs or data.read_jsonl(args.data),
                                 self.tokenizer, args.block_size)
        # of a model: the context, how many ids it reads, how many it emits
        self.sizes = args.block_size, self.tokenizer.n_vocab, self.tokenizer.n_vocab
        self.train, self.held_out = data.hold_out(self.pairs, args.holdout, args.seed)
        # (R,) both rows of each training pair, so that the reference gives both some probability
        self.sft_weight = torch.zeros(len(self.pairs.length))
        self.sft_weight[self.pairs.pair_rows(self.train)] = 1

    def set_reference(self, ref_logp):  # (R,)
        self.pairs.ref_logp = ref_logp

    def evaluate(self, policy):
        """Means over the held-out pairs, or all if there are none."""
        rows = self.pairs.pair_rows(self.held_out)
        logp = score(policy, self.pairs, self.args, rows)
        return pair_numbers(logp, self.pairs.ref_logp[rows],
                            self.pairs.p[self.held_out], self.args)


# ------------------------------------------------------------------------------------------------ the program

DEVICE = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")  # cuda, mps, ... if any
# Columns apply from left to right: world or file, then init_from, sample, resume, each if it is given.
# "=" keeps the default so far. "none": not set. "-": the flag is refused. So with a file and --init_from gpt2
# sft_steps has 400 from the column file, then 0 from init_from.
FLAGS = f"""
flag         world    file     init_from  sample  resume  takes         meaning
loss         ipo      ipo      =          -       -       {'|'.join(LOSSES)}  the loss on the margin
tau          0.2      0.1      =          -       -       0.01..1e9     pull to the reference; DPO's beta
data         bt       (given)  =          -       -       text          bt, deterministic, cyclic, or a file
init_from    none     none     =          =       -       text          a run's .pt file, or GPT-2's weights
out          out      out      =          =       =       text          folder of the run's files
labels       hard     -        =          -       -       hard|soft     coin flips, winner first; or p* itself
mu           uniform  -        =          -       -       uniform|ref   where the responses come from
pairs        560000   -        =          -       -       1..1e7        pairs to draw
tokenizer    -        gpt2     -          -       -       text          gpt2, or bytes (needs no network)
holdout      -        0.1      =          -       -       0.0..0.9      share of the prompts to hold out
block_size   -        256      -          -       -       1..1e6        context in tokens
steps        2200     200      =          -       -       1..1e7        steps of preference training
batch_size   256      16       =          -       -       1..1e6        pairs in a step
lr           2.5e-3   1e-4     =          -       -       1e-9..1e9     peak learning rate
sft_steps    200      400      0          -       -       0..1e7        steps of SFT before it
sft_lr       3e-3     1e-3     =          -       -       1e-9..1e9     peak learning rate of SFT
log_every    200      50       =          -       -       1..1e7        steps between log lines and saves
n_layer      1        4        -          -       -       1..1e3        blocks of the GPT
n_head       2        4        -          -       -       1..1e3        attention heads
n_embd       32       128      -          -       -       1..1e5        channels, a multiple of n_head
device       {DEVICE}      {DEVICE}      =          =       =       cpu|{DEVICE}       where the model is
dtype        float32  float32  =          -       -       float32|bfloat16  of matrix products
seed         0        0        =          =       -       0..1e9        fixes all that is random
sample       none     none     =          =       -       text          a prompt: print the policy's answer
temperature  -        -        -          1       -       0.0..1e9      of that answer; 0: the likeliest
resume       none     none     =          -       =       yes           go on with the run in --out
overwrite    none     none     =          -       -       yes           replace the run in --out
"""
# the first line has the names of the columns; maxsplit, as the meaning has blanks
NAMES, *ROWS = [line.split(maxsplit=7)
                for line in FLAGS.strip().splitlines()]


class Parser(argparse.ArgumentParser):
    # in place of argparse's, which exits
    def error(self, message):
        raise Refused(f"{message[:200]}; --help lists the flags")


def parse(argv=None):
    """All flags of a run. What is not given has the default of its kind of run. Raises Refused."""
    parser = Parser(usage=__doc__ + FLAGS, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, *_, takes, _ in ROWS:
        # --resume alone means --resume yes; so with --overwrite
        alone = {"nargs": "?", "const": "yes"} if takes == "yes" else {}
        parser.add_argument(f"--{name}", **alone)
    given = vars(parser.parse_args(argv))  # SUPPRESS: what was typed, and no defaults
    # the columns that apply (of no account with --resume, which takes the flags from ref.pt)
    kinds = ["world" if given.get("data", "bt") in data.WORLDS else "file"]
    # init_from, sample and resume
    kinds += [kind for kind in NAMES[3:6] if kind in given]
    flags = {}
    # the last column that applies, and is not "=", has the default
    for cells in ROWS:
        row = dict(zip(NAMES, cells))
        name = row["flag"]
        default = [row[kind] for kind in kinds if row[kind] != "="][-1]
        if default == "-" and name in given:
            raise Refused(f"--{name} does nothing here ({', '.join(kinds)}); leave it out")
        flags[name] = None
        if name in given or default not in ("-", "none"):
            flags[name] = value_of(name, given.get(name, default), row["takes"])
    args = argparse.Namespace(**flags)
    if args.resume:  # all flags come from ref.pt, but for three
        args = argparse.Namespace(**at_present(model.read(f"{args.out}/ref.pt")["flags"], args))
    return args


def at_present(flags, args):
    """The saved flags of a run, with the three that may be others now."""
    return flags | {"out": args.out, "device": args.device, "resume": args.resume}


def value_of(name, text, takes):
    """The value of a flag. Raises Refused if it is not what the table says that the flag takes."""
    if text in takes.split("|") or takes == "text" and text:
        return text
    low, _, high = takes.partition("..")
    kind = int if low.isdigit() else float  # "1..1e7" takes whole numbers, "0.0..1e9" all
    try:
        # of choices, "hard|soft" say, kind(low) is a ValueError, too; f"{text}", as --tau=-- gives a list
        if kind(low) <= kind(f"{text}") <= float(high):
            return kind(text)
    except ValueError:
        pass
    raise Refused(f"--{name} is {data.short(text)!r}; it takes {takes}")


def claim(out, overwrite):
    """Removes an older run if --overwrite says so, or if it is a world's and finished (has report.json).

    Any other is refused.
    """
    os.makedirs(out, exist_ok=True)
    old = {"report.json", "ckpt.pt", "ref.pt"}.intersection(os.listdir(out))
    if old and not overwrite:
        flags = model.read(f"{out}/ref.pt")["flags"]
        if "report.json" not in old or flags["data"] not in data.WORLDS:
            raise Refused(f"--out {out} holds a run; --resume it, --overwrite it, or name another --out")
    for name in sorted(old):
        os.remove(f"{out}/{name}")
        print(f"{name} of an earlier run is removed")


def refuse_what_cannot_run(source, args):
    """Raises Refused, before anything is replaced, if data, weights and loss do not fit together."""
    # args.tokenizer: that of --init_from's weights or of a resumed run, else the flag (None in a world). So
    # GPT-2's weights for a world are refused.
    if args.tokenizer not in (None, source.tokenizer.name):
        raise Refused(f"--init_from {args.init_from} knows the tokens of {args.tokenizer}, and --data "
                      f"{args.data} has those of {source.tokenizer.name}; use weights of the same kind")
    p = source.pairs.p
    # h = 0: the loss is infinite if a target is
    loss = LOSSES[args.loss](0 * p, p, args.tau)
    if not loss.isfinite().all():
        raise Refused("a label asks for an infinite margin, since this psi is infinite at 0 or 1 (as logit "
                      "is); use another psi, or in bt and cyclic --labels soft")


def run(args, policy=None, source=None):
    """One run: reference, pairs, training, report. policy and source may be your own.

    The comment before `finetune` says what a source has.
    """
    torch.manual_seed(args.seed)
    if args.init_from and policy is None:
        policy, args.tokenizer = model.load(args.init_from)
        args.block_size = policy.config.block_size  # a file's texts are cut to it
    source = source or (WorldSource(args) if args.data in data.WORLDS else FileSource(args))
    refuse_what_cannot_run(source, args)  # before make_reference removes an older run
    args.tokenizer = source.tokenizer.name  # saved with the flags, for model.load
    policy = policy or model.GPT(model.GPTConfig(
        *source.sizes, args.n_layer, args.n_head, args.n_embd))
    policy.to(args.device)
    make_reference(policy, source, args)
    lines = {name: source.numbers(logp) for name, logp in source.exact.items()}
    log = train(policy, shuffled_batches(source, args), args, source.evaluate)
    lines["after"] = source.evaluate(policy)
    for name, numbers in lines.items():
        told(name, numbers)
    with open(f"{args.out}/report.json", "w") as file:
        json.dump({"flags": vars(args), "log": log, **lines},
                  file, indent=1)


def make_reference(policy, source, args):
    """SFT makes the policy the reference. ref.pt gets it, and its log-prob of every row.

    A new run has no ref.pt. One that was interrupted in SFT has a ref.pt without ref_logp, and SFT starts
    again from the same weights. One that was interrupted later reads both. Raises Refused if the data have
    changed.
    """
    path = f"{args.out}/ref.pt"
    if not args.resume:
        claim(args.out, args.overwrite)
    # they are of this start alone, and so not saved
    args.resume = args.overwrite = None
    saved = model.read(path) if os.path.exists(path) else {}
    if "ref_logp" in saved:  # interrupted later
        model.restore(policy, saved)
    else:  # new, or interrupted in SFT
        model.save(path, policy, args)  # only for its flags: --resume needs them if SFT is interrupted
        finetune(policy, source, args)
        saved["ref_logp"] = score(policy, source.pairs, args)
    source.set_reference(saved["ref_logp"])
    digest = source.pairs.digest()  # a new run has none to compare it with
    if saved.get("digest", digest) != digest:
        raise Refused(f"--resume: --data {args.data} is not what it was when this run began; bring it back")
    model.save(path, policy, args, ref_logp=saved["ref_logp"], digest=digest)


def sample(args):
    """--sample: the prompt, and what the policy says after it."""
    policy, name = model.load(args.init_from or f"{args.out}/ckpt.pt")
    policy.to(args.device)
    print(args.sample + model.generate(policy, data.get_tokenizer(name), args.sample,
                                       args.temperature, args.seed))


def main(argv=None):
    """The command line. Exit status 0, 1 if a run had to stop, else 2; one line says why."""
    try:
        args = parse(argv)
        if args.data in data.WORLDS:
            torch.set_num_threads(1)  # its matrices are so small that a second thread costs time
        sample(args) if args.sample else run(args)
        return 0
    except (Refused, OSError, KeyboardInterrupt, RuntimeError) as error:
        # out of memory is the user's; any other RuntimeError is ours
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print("ipo.py:", data.one_line(str(error) or "interrupted; --resume goes on where it was saved"),
              file=sys.stderr)
        return 1 if isinstance(error, (Stopped, KeyboardInterrupt)) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or pipe may lack a sample's characters
    sys.exit(main())
