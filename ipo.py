"""nanoIPO: preference optimisation by IPO, small enough to read, on a world small enough to know the exact answer.

  objective  max_pi  E[ Psi(p*(y>y')) ] - tau KL(pi||ref),  y ~ pi, y' ~ mu             (Azar et al. 2023, eq. 6)
  optimum    pi*(y)  =  ref(y) exp( E_{y'~mu}[ Psi(p*(y>y')) ] / tau ) / Z              (eq. 7; Z normalises)
  margin     h       =  log pi(yw)/ref(yw) - log pi(yl)/ref(yl)                         (eq. 12)
  target(p)          =  ( Psi(p) - Psi(1-p) ) / (2 tau)         p = P(yw is preferred to yl)
  IPO                   ( h - target(p) )^2                     Psi(q) = q, p = 1: ( h - 1/(2 tau) )^2, eq. 17
  DPO                   -p log s(tau h) - (1-p) log s(-tau h)   eq. 4; its beta is our tau

Symbols: pi policy, ref frozen reference, mu where responses come from, yw / yl chosen / rejected response, s sigmoid.
Log-probs and margins are in nats; log pi(y) is a sum over the tokens of y. More tau: closer to ref.
Sizes: N pairs, B in a batch, T tokens, R rows (a row is a prompt with one response), X prompts, Y responses in a world,
K taus and S seeds that a bandit trains at once.

  python ipo.py --loss ipo                          the synthetic world: train, then measure the distance to pi*
  python ipo.py --loss ipo dpo --tau 0.2 1 --plot   a grid of runs from one reference, in one table and one picture
  python ipo.py --data d1 --loss ipo dpo --plot     the paper's bandit, figure 1
  python ipo.py --sample "review of the pizza:"     sample from the finished run
  python ipo.py --data FILE.jsonl                   pairs of your own
  python ipo.py --data FILE.jsonl --init_from gpt2  ... and weights of Hugging Face's
  python ipo.py --help                              --out holds one run: --resume, --overwrite or another folder
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data as D
import model as M

# ======================================= EXERCISE: what is a preference worth? =======================================


def psi(q):  # preference probabilities in [0,1], a tensor of any shape -> their worth, same shape
    return q


# ================================================= END OF THE EXERCISE ================================================

PSI = {"yours": lambda q: psi(q),  # --psi NAME; the default: what stands between the banners, looked up at each call
       "identity": lambda q: q, "logit": torch.logit, "tanh": lambda q: torch.tanh(8 * (q - 0.5)),
       "cubic": lambda q: (2 * q - 1) ** 3}


def check_tau(tau):  # a number or (B,)
    if not (torch.as_tensor(tau) > 0).all():
        raise ValueError(f"tau must be > 0, got {tau}")


def target(p, tau, psi=PSI["yours"]):  # (B,) -> (B,)
    """The margin in nats that a pair asks for if its first response is preferred with probability p; a tie asks for 0.

    Read in one order the pair asks h for Psi(p)/tau, in the other -h for Psi(1-p)/tau (if certain: h for 1/tau and for
    0). This is the mean of both, so its 1/2 is exact. Raises ValueError unless tau > 0.
    """
    check_tau(tau)
    return (psi(p) - psi(1 - p)) / (2 * tau)


def ipo_loss(h, p, tau, psi=PSI["yours"]):  # (B,), (B,) -> (B,)
    """Squared distance to the target (eq. 17 at p = 1), nats^2. Slope 2 (h - target): it pulls back what overshot."""
    return (h - target(p, tau, psi)) ** 2


def dpo_loss(h, p, tau):  # (B,), (B,) -> (B,)
    """Logistic loss (eq. 4 at p = 1). Slope -tau (p - s(tau h)): at p = 1 it never changes sign, so h never stops."""
    check_tau(tau)
    return -p * F.logsigmoid(tau * h) - (1 - p) * F.logsigmoid(-tau * h)


def both_ways(f):
    """f(z), z = tau h, is the loss of a pair whose first response surely won; this is the loss at any p: linear in p,
    so that a coin flip may stand for p whatever f is. `own`: what f alone needs."""
    def loss(h, p, tau, **own):  # (B,), (B,) -> (B,)
        check_tau(tau)
        return p * f(tau * h, **own) + (1 - p) * f(-tau * h, **own)
    return loss


s, log_s, EPS = torch.sigmoid, F.logsigmoid, 1e-3
LOSSES = {
    "ipo": ipo_loss,
    "dpo": dpo_loss,
    # Gao et al. 2024, arXiv:2404.16767: a regression on reward differences, which are logit(p) under Bradley-Terry
    "rebel": lambda h, p, tau: ipo_loss(h, p, tau, torch.logit),
    # GPO, Tang et al. 2024, arXiv:2402.05749: these four. (SLiC-HF, Zhao et al. 2023, 2305.10425, has no reference)
    "slic": both_ways(lambda z: F.relu(1 - z)),
    "squared_hinge": both_ways(lambda z: F.relu(1 - z) ** 2),
    "exponential": both_ways(lambda z: torch.exp(-z)),
    "savage": both_ways(lambda z: s(-z) ** 2),
    # Lu et al. 2024, arXiv:2406.08414: found by a search, and at z = 0 its slope has the wrong sign (+.784)
    "discopop": both_ways(lambda z: (1 - s(z / 0.05)) * -log_s(z) + s(z / 0.05) * torch.exp(-z)),
    # Chowdhury et al. 2024, arXiv:2403.00409: DPO of the clean label, on average, if that share of labels is flipped
    "robust": both_ways(lambda z, label_noise: ((label_noise - 1) * log_s(z) + label_noise * log_s(-z))
                        / (1 - 2 * label_noise)),
    # Ji et al. 2024, arXiv:2402.00856: KL from the policy's preference to a label smoothed by EPS
    "exo": both_ways(lambda z: s(z) * (log_s(z) - math.log(1 - EPS)) + s(-z) * (log_s(-z) - math.log(EPS))),
    # Meng et al. 2024, arXiv:2405.14734: z from mean log-probs and without a reference
    "simpo": both_ways(lambda z, gamma: -log_s(z - gamma)),
    # EXERCISE 11: "mine": both_ways(lambda z: ...), a loss of your own, and below in LINK the Psi that belongs to it
}
LINK = {  # loss -> the Psi whose target minimises it at p: tau h = argmin over z of p f(z) + (1-p) f(-z)
    "dpo": torch.logit, "rebel": torch.logit, "savage": torch.logit, "exponential": lambda q: torch.logit(q) / 2,
    "slic": lambda q: (2 * q - 1).sign(), "squared_hinge": lambda q: 2 * q - 1,
    "exo": lambda q: (2 * q - 1) * math.log((1 - EPS) / EPS),
    # EXERCISE 11: "mine": lambda q: ...
}
START = {  # loss -> f(0), its value at h = 0 for every p, which step 0 must have; squared targets have mean target^2
    "dpo": math.log(2), "robust": math.log(2), "slic": 1.0, "squared_hinge": 1.0, "exponential": 1.0, "savage": 0.25,
    "discopop": (1 + math.log(2)) / 2, "exo": -math.log(2) - math.log(EPS * (1 - EPS)) / 2}


HAS_TARGET = {"ipo", *LINK}  # other losses ask a single pair for no margin, or for several


def loss_function(args):  # -> f(h, p, tau) -> (B,)
    """The loss of --loss with what it alone needs."""
    own = {"ipo": {"psi": PSI[args.psi]}, "robust": {"label_noise": args.label_noise}, "simpo": {"gamma": args.gamma}}
    return functools.partial(LOSSES[args.loss], **own.get(args.loss, {}))


def worth(args):
    """The Psi of the optimum that a run is measured against; logit for losses without a Psi of their own."""
    return PSI[args.psi] if args.loss == "ipo" else LINK.get(args.loss, torch.logit)


def margin(logp, ref_logp):  # (2B,), (2B,) or 0 -> (B,)
    """h: how much further, in nats, the policy moved towards the chosen than towards the rejected response."""
    chosen, rejected = (logp - ref_logp).chunk(2)
    return chosen - rejected


LOWER = "--lr, or take a --tau or --gamma nearer to 1"  # what to lower if training diverges


class Interrupted(BaseException):
    """A signal that ends the run: (its number, what to tell)."""


@contextlib.contextmanager
def signals(handle):
    """Inside, Ctrl-C and SIGTERM call handle(their number)."""
    before = {n: signal.signal(n, lambda n, _: handle(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def train(model, pairs, ref_logp, tau, order, args, log, save=lambda step, parts: None, state=None):
    """Preference training on `pairs` (N), which `order` yields as batches of indices, at tau (N,), against ref_logp
    (R,), the reference's log-probs of all rows, computed beforehand: no second model exists. Calls log(step, numbers)
    every --log_every steps and after the last (of the batch as it was before the update); save(step, parts) every
    --save_every, after the last and after a signal, which then raises Interrupted; `state`: go on from there. Several
    processes share each batch."""
    protocol = args.task == "bandit" and args.batch_size > 0  # the paper's; with all pairs the rate must fall, or Adam
    clip = math.inf if protocol else 1.0                      # would circle the exact optimum
    update, parts = M.descent(model, args.steps, args.lr, args.bench or protocol, clip, args.dtype)
    sequence_logp = M.parallel(model)  # called like M.sequence_logp; with several processes it averages gradients
    loss_of, (rank, processes), caught = loss_function(args), M.process(), []
    begin, skipped = state["step"] if state else 0, 0
    if state:
        M.restore(parts, state)
    with signals(caught.append):
        rest = tqdm(itertools.islice(order, begin, None), args.loss, args.steps - begin, disable=None, leave=False)
        for step, index in enumerate(rest, begin + 1):
            model.train()  # log has scored without dropout
            seen = []  # of each part of the batch; there is one, unless memory is short (--accum)
            for part in index[rank::processes].tensor_split(args.accum):
                batch = pairs.batch(part)
                tokens, mask, p, ref, tau_b = (z.to(args.device) for z in (*batch[:3], ref_logp[batch.rows], tau[part]))
                with M.autocast(model, args.dtype):
                    logp = sequence_logp(tokens, mask, mean=args.logp == "mean")  # (2B,)
                h = margin(logp, ref)                                             # (B,)
                loss = loss_of(h, p, tau_b).sum() / len(index)                    # () mean over the whole batch
                parts["scaler"].scale(loss * processes).backward()                # loss.backward(), but for float16
                seen.append(torch.stack([logp.detach(), ref]).view(2, 2, -1))  # pi, ref x chosen, rejected x pairs
            done = update()  # None: float16 overflowed, and the step is skipped; False: diverged
            skipped += done is None
            if done is False:
                rows = ", ".join(map(str, pairs.line[index[:20]].tolist())) + ", ..." * (len(index) > 20)
                raise M.Stopped(f"step {step}: the loss or its gradient is not finite, on the pairs {rows} (lines of a "
                                f"file); what was saved before stays; lower {LOWER}")
            if step % args.log_every == 0 or step == args.steps:
                every = torch.zeros(2, 2, len(index), dtype=logp.dtype)  # each process fills in its share
                every[..., rank::processes] = torch.cat(seen, -1).cpu()
                log(step, measure(*M.total(every, args.device).flatten(1), pairs.p[index], tau[index], args))
            stop = M.total(torch.tensor(float(len(caught))), args.device) > 0  # of any process
            if stop or step == args.steps or args.save_every and step % args.save_every == 0:
                save(step, parts)
            if stop:  # if no signal came here, another process has one
                raise Interrupted((caught or [signal.SIGTERM])[0], f"stopped after step {step} of {args.steps}")
    if skipped:
        print(f"{args.dtype}: {skipped} of {args.steps - begin} steps skipped, in which scaled gradients overflowed")


# ---------------------------------------------------------------------------------------------------------- measurement

def measure(logp, ref_logp, p, tau, args):  # (2B,), (2B,) or 0, (B,), number or (B,) -> dict of floats
    """The numbers of a log line. `win`: the share of pairs whose margin has the label's sign; ties (p = 1/2, or a
    margin under .0005 nats, which may be rounding) count one half. `target`: None if infinite, as DPO's is at p = 1, or
    if the loss has no link."""
    h = margin(logp, ref_logp)
    chosen, rejected = (logp - ref_logp).chunk(2)
    asked = target(p, tau, worth(args)).mean().item() if args.loss in HAS_TARGET else math.inf
    win = ((h.round(decimals=3) * (p - 0.5)).sign().mean().item() + 1) / 2
    return {"loss": loss_function(args)(h, p, tau).mean().item(), "h": h.mean().item(),
            "h_std": h.std(correction=0).item(), "target": asked if math.isfinite(asked) else None,
            "chosen": chosen.mean().item(), "rejected": rejected.mean().item(), "win": win}


def score_pairs(model, pairs, args):  # -> (2N,)
    """log pi of the chosen, then of the rejected responses, without gradient or dropout."""
    return M.score(model, pairs, pairs.pair_rows(), 2 * args.batch_size or 512, args.dtype, args.logp == "mean")


def distribution(model, world, args):  # -> (X,Y) float64
    """log pi(y|x) of every response to every prompt of a world: the whole policy, by enumeration."""
    rows = torch.arange(world.length.numel())
    return M.score(model, world.data, rows, 2 * args.batch_size or 512, args.dtype).view(world.length.shape).double()


def response_distribution(ref, args):  # log ref (X,Y) -> (X,Y)
    """mu: where the responses of the pairs come from."""
    uniform = torch.full_like(ref, 1 / ref.shape[1])  # EXERCISE 12: another distribution; each row sums to 1, none is 0
    return uniform if args.mu == "uniform" else ref.exp()


def theory(world, ref, args):  # log ref (X,Y) -> mu, log pi*, log of the fitted policy (None: pi* itself), (X,Y) each
    """The fitted policy is IPO's minimiser on endless labels of this kind: ref exp(E_mu E[target]), normalised. It is
    pi* if nothing of what `departures` names is the case."""
    mu = response_distribution(ref, args)
    best = D.optimum(ref, world.pstar, mu, psi := worth(args), args.tau)
    if args.loss != "ipo":
        return mu, best, None
    q = world.pstar + args.noise * (1 - 2 * world.pstar)
    asked = target(q, args.tau, psi) if args.labels == "soft" else (2 * q - 1) * target(torch.ones(()), args.tau, psi)
    if args.logp == "mean":
        return mu, best, D.mean_optimum(ref, (asked * mu[:, None, :]).sum(-1), world.length)
    fit = D.optimum(ref, asked, mu, lambda value: value, 1.0)  # a target stands for Psi(p*)/tau
    return mu, best, None if torch.allclose(fit, best, rtol=1e-9, atol=1e-9) else fit


def check_targets(p, args):
    """Refuses a psi that is no function of a tensor, and one that asks for an infinite margin at a probability that the
    labels hold; p of any shape."""
    if args.loss not in ("ipo", "rebel"):
        return
    q, seen = torch.linspace(0, 1, 11), torch.linspace(0, 1, 11)  # psi might change `seen` in place
    try:
        value = worth(args)(seen)
    except Exception as error:  # whatever a student's line may raise
        why = " ".join(str(error).split())[:80]
        raise D.Refused(f"psi in ipo.py raises {type(error).__name__} ({why}) on a tensor of probabilities; mend "
                        "it") from None
    if not isinstance(value, torch.Tensor) or value.shape != q.shape or not value.is_floating_point() \
            or not seen.equal(q):
        raise D.Refused("psi in ipo.py must return a tensor of numbers of q's shape and leave q itself as it is; for a "
                        "condition write (q > 0.5).float(), for a constant 0 * q + 1")
    if value.isnan().any():
        raise D.Refused(f"psi in ipo.py is not a number at q = {q[value.isnan()][0]:g}; mend it")
    if (value.diff() < 0).any():
        print("psi falls somewhere: there it asks for the response that fewer prefer")
    if not (finite := target(p, 1.0, worth(args)).isfinite()).all():
        worst = p[~finite].max().item()
        raise D.Refused(f"--loss {args.loss}: its target psi({worst:g}) - psi({1 - worst:g}) is not finite: an "
                        "infinite margin on certain pairs is DPO's over-fitting; use labels with 0 < p < 1 (--labels "
                        "soft, in a world that is not deterministic) or, with --loss ipo, a Psi that is finite there")


def check_start(model, pairs, ref_logp, args):
    """Step 0: pi = ref, so margins are 0 and the loss is known. Raises M.Stopped if the cache is another model's."""
    if args.loss == "simpo":
        return print("step 0: SimPO has no reference, so theory does not know its loss")
    pairs = pairs.select(torch.arange(min(args.batch_size or len(pairs.p), len(pairs.p))))
    ref, logp = ref_logp[pairs.pair_rows()], score_pairs(model, pairs, args)
    off, loss = margin(logp, ref).abs().max().item(), measure(logp, ref, pairs.p, args.tau, args)["loss"]
    if squared := args.loss in ("ipo", "rebel"):
        due = (target(pairs.p, args.tau, worth(args)) ** 2).mean().item()
    else:  # a loss of your own is taken at its word
        due = START.get(args.loss, loss_function(args)(torch.zeros(len(pairs.p)), pairs.p, args.tau).mean().item())
    why = "mean of target^2" if squared else "loss at h = 0"
    print(f"step 0: loss {loss:.6g}, theory {due:.6g} ({why})")
    rounding = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}[args.dtype] * (1 + ref.abs().max().item())
    slope = 2 * due ** 0.5 + 4 * args.tau / (1 - 2 * args.label_noise)  # of any loss here, near h = 0, at most
    if not (off <= rounding and abs(loss - due) <= 1e-5 * due + off * (off + slope)):
        raise M.Stopped(f"step 0: margins up to {off:.3g} nats where pi = ref has 0, or the loss is not theory's; "
                        "the cached reference is not the policy that training starts from, or a loss was edited")


def best_policies(world, ref, args, psi, low, high, n):
    """Yields (tau, log pi* (X,Y), E p*(y>y') of each response (X,Y)) for n taus, from high to low."""
    mu = response_distribution(ref, args)[:, None, :]
    worth_of, wins = (psi(world.pstar) * mu).sum(-1), (world.pstar * mu).sum(-1)
    for tau in np.geomspace(high, low, n).tolist():
        yield tau, (ref + worth_of / tau).log_softmax(-1), wins


def frontier(world, ref, args):
    """[(KL(pi||ref), win rate against mu)] that no policy beats, by rising KL: these are pi* of Psi = identity."""
    return [(D.kl(best, ref).item(), (best.exp() * wins).sum(-1).mean().item())
            for _, best, wins in best_policies(world, ref, args, PSI["identity"], 0.003, 3000, 300)]


def nearest(world, ref, logp, args):
    """(KL(pi||pi*), tau) of the nearest pi* of any tau: the sum that an IPO run with mean log-probs amounts to."""
    return min((D.kl(logp, best).item(), tau)
               for tau, best, _ in best_policies(world, ref, args, worth(args), 0.003, 30, 300))


# --------------------------------------------------------------------------------------------------------------- output

def log_line(kind, step, args, n, extra=""):
    """One line of fixed width; the README says what the columns mean."""
    asked = "-" if args.loss not in HAS_TARGET else "inf" if n["target"] is None else f"{n['target']:.2f}"
    ratios = f"chosen {n['chosen']:+6.2f} rejected {n['rejected']:+6.2f}"
    tqdm.write(f"{kind} {step:5d}/{args.steps} | loss {n['loss']:8.4f} | h {n['h']:+6.2f} ± {n['h_std']:5.2f} -> "
               f"{asked} | {ratios} | win {n['win']:.2f}{extra}", file=sys.stdout)


def departures(args):  # -> list of texts
    """Why labels may lead IPO elsewhere than to pi*."""
    q, psi = torch.linspace(0.01, 0.99, 99, dtype=torch.float64), worth(args)
    even, asked = psi(q) + psi(1 - q), target(q, 1.0, psi)
    rounding = 1e-6 * asked.abs().max()
    causes = {
        "log-ratios divided by length have the optimum ref exp(|y| (g/tau + c)); h is per token": args.logp == "mean",
        "Psi is not odd about 1/2, and only its odd part, (Psi(q) - Psi(1-q))/2, is optimised": even.std() > rounding,
        "a coin flip stands for p* only if that odd part is affine (--labels soft)": args.labels == "hard"
        and not torch.allclose(asked, (2 * q - 1) * target(torch.ones(()), 1.0, psi), rtol=1e-6, atol=rounding.item()),
        "labels are flipped (--noise 0)": args.noise > 0}
    return [cause for cause, here in causes.items() if here]


UNITS = {"kl_ref": "KL(pi||ref), nats", "kl_opt": "KL(pi||pi*), nats", "win": "win rate against mu",
         "objective": "objective J, of Psi", "ratio": "max |log pi/ref|, nats", "h": "h to the likelier, nats",
         "kl_fit": "KL(pi||labels), nats", "below": "win below frontier"}


def print_report(report, args):
    """A row per exact quantity, a column per policy: measured, then what theory expects; - is what is not finite."""
    show = lambda value: "         -" if value is None else f"{value:z10.4f}"
    print(f"\n{'exact, mean over prompts':26}" + "".join(f"{column:>10}" for column in report))
    for key in report["after"]:
        print(f"{UNITS[key]:26}" + "".join(show(column[key]) for column in report.values()))
    if "labels" in report:
        print("labels = where these labels lead IPO, not pi*: " + "; ".join(departures(args)))
    elif args.logp == "mean":
        print("pi* is the sum's; with mean log-probs this loss has an optimum of its own, not computed; h is per token")
    if report["optimum"]["ratio"] is None:
        print("pi* is a limit: certain pairs always ask this loss for more, so max |log pi/ref| grows with --steps")


def show_pairs(title, model, pairs, tokenizer, args, ref=None):
    """Prints the first args.show pairs as the model sees them: the prompt (grey on a terminal), then each token of both
    responses, end-of-text included, with its log-prob or, against `ref`, its log-ratio, in nats; returns the log-probs
    of each row."""
    grey, plain = ("\033[90m", "\033[0m") if sys.stdout.isatty() else ("", "")
    rows = torch.stack([pairs.chosen, pairs.rejected], 1)[:args.show].flatten().tolist()
    scores = [M.token_scores(model, pairs, row, args.dtype) for row in rows]
    print(f"\nfirst {len(rows) // 2} pairs, {title} of each token in nats" if rows else "", end="\n" * bool(rows))
    for i, (row, (ids, logp)) in enumerate(zip(rows, scores)):
        if i % 2 == 0:
            print(f"{grey}{tokenizer.decode(pairs.prompt_ids(row))!r}{plain}  p {pairs.p[i // 2]:.2f}")
        value = logp if ref is None else logp - ref[i]
        print(f"  {'rejected' if i % 2 else 'chosen':8} {value.sum():+8.2f} = " + " ".join(
            f"{repr(tokenizer.decode([token]))[1:-1]}{grey}[{v:+.2f}]{plain}" for token, v in zip(ids.tolist(), value)))
    return [logp for _, logp in scores]


def print_grid(results):
    """A line per run: what it ended with, and in a world what the optimum has."""
    world = "optimum" in next(iter(results.values()))[0]
    shown = ["kl_ref", "kl_opt", "win", "ratio", "below"] if world else ["loss", "h", "chosen", "rejected", "win"]
    title = "at the end / optimum" if world else "eval, at the end"
    print(f"\n{title:26}" + "".join(f"{UNITS[key] if world else key:>24}" for key in shown))
    for (loss, tau), (report, _) in results.items():
        columns = [report[name] for name in ("after", "optimum") if name in report]
        cells = [" / ".join("-" if c[key] is None else f"{c[key]:z.4f}" for c in columns if key in c) for key in shown]
        print(f"{f'{loss}, tau {tau:g}':26}" + "".join(f"{cell:>24}" for cell in cells))


CARD = (0.5, 0.6, 0.75, 0.9, 0.99, 1.0)


def print_card(args, p=None, h=None, due=None):  # (N,) each
    """The Psi card: for labels p the margin that a pair asks for, and if given what such pairs got, and what they have
    where the labels lead (pi*, unless the report says otherwise)."""
    if args.loss not in HAS_TARGET:
        return
    asked = target(torch.tensor(CARD), args.tau, worth(args)).tolist()
    table = {"p = P(chosen preferred)": CARD, "target(p), nats": asked}
    if h is not None:
        at = lambda z: [z[(p - q).abs() < 0.004].mean().item() for q in CARD]  # nan where no pair is
        table |= {"h reached": at(h), "h where labels lead": at(due)}
    for name, values in table.items():
        print(f"{name:26}" + "".join(f"{'-' if math.isnan(v) else f'{v:z.2f}':>8}" for v in values))


# ------------------------------------------------------------------------------------------------------------- pictures
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00"]  # Okabe and Ito's
STYLES = ["-", "--", ":", "-."]


def panels(rows, columns):  # -> figure, axes (rows, columns); large type, to be read at half size
    import matplotlib
    matplotlib.use("Agg")  # files only: no window, no display
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 18, "legend.fontsize": 16, "lines.linewidth": 2.5, "axes.grid": True,
                            "grid.alpha": 0.3})
    size = 6.5 * columns, 2 + 3.8 * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flatten():
        axis.locator_params(axis="x", nbins=5)
    return figure, axes


def save_picture(figure, path):
    figure.savefig(path, dpi=80)
    print(f"picture: {path}")


def plot_runs(results, best, args):
    """Margin against step, dashed what a certain pair asks for, dotted what pi* has; then in a world KL(pi||ref)
    against step, and win rate against KL with `best`, the exact frontier [(KL, win)]; for a file the held-out win rate.
    Colours are losses, line styles taus."""
    names = {"h": "margin h, nats", "kl_ref": "KL(pi||ref), nats", "win": "win rate" + " against mu" * bool(best)}
    figure, axes = panels(1, 3 if best else 2)
    for (loss, tau), (report, lines) in results.items():
        i, j = args.loss.index(loss), args.tau.index(tau)
        look = {"color": COLOURS[i % 8], "linestyle": STYLES[(j + i // 8) % 4]}
        steps, values = [line["step"] for line in lines], {k: [line["eval"].get(k) for line in lines] for k in names}
        axes[0, 0].plot(steps, values["h"], label=f"{loss}, tau {tau:g}", **look)
        one = argparse.Namespace(**vars(args) | {"loss": loss, "tau": tau})
        asked = target(torch.ones(()), tau, worth(one)).item() if loss in HAS_TARGET else math.inf
        for height, dashes in (asked, (6, 4)), (report.get("optimum", {}).get("h"), (1, 2)):
            if height is not None and math.isfinite(height):
                axes[0, 0].axhline(height, color=look["color"], linestyle=(0, dashes), linewidth=1.5)
        axes[0, 1].plot(steps, values["kl_ref" if best else "win"], **look)
        if best:
            axes[0, 2].plot(values["kl_ref"], values["win"], **look, alpha=0.5)
            axes[0, 2].plot(values["kl_ref"][-1], values["win"][-1], "o", markersize=11, color=look["color"])
    for axis, (x, y) in zip(axes[0], [("step", "h"), ("step", "kl_ref" if best else "win"), ("kl_ref", "win")]):
        axis.set(xlabel=names.get(x, x), ylabel=names[y])
    figure.legend(loc="outside upper center", ncols=4)
    if best:
        axes[0, 2].plot(*zip(*best), color="black", linewidth=1.5, label="exact frontier", zorder=0)
        far = max(line["eval"]["kl_ref"] for _, lines in results.values() for line in lines)
        axes[0, 2].set_xlim(-0.03 * far, 1.1 * far + 1e-6)
        axes[0, 2].legend()
    save_picture(figure, f"{args.out}/runs.png")


def plot_actions(results, args):
    """Figures 1 and 2 of the paper: probabilities of the actions against step, mean over seeds and 1.96 standard errors
    of it; a column per loss, a row per tau; dashed: the exact optimum."""
    figure, axes = panels(len(args.tau), len(args.loss))
    for axis, ((loss, tau), (report, lines)) in zip(axes.T.flatten(), results.items()):
        for a, (best, colour, style) in enumerate(zip(report["optimum"]["pi"], COLOURS, STYLES)):
            middle, half = (torch.tensor([line["eval"][key][a] for line in lines]) for key in ("pi", "interval"))
            steps = [line["step"] for line in lines]
            axis.plot(steps, middle, style, color=colour, label="abc"[a])
            axis.fill_between(steps, middle - half, middle + half, color=colour, alpha=0.25, linewidth=0)
            axis.axhline(best, color=colour, linestyle=(0, (6, 4)), linewidth=1)
        axis.set(title=f"{loss}, tau {tau:g}", ylim=(-0.03, 1.03))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0, 0].set_ylabel("probability")
    axes[0, 0].legend(title="action")
    save_picture(figure, f"{args.out}/actions.png")


def plot_psi(args, p, h):
    """The Psi card drawn: target against p, a curve for every Psi, and the mean margin that was reached at each p."""
    figure, axes = panels(1, 1)
    figure.set_size_inches(9, 6)
    q = torch.linspace(0.005, 0.995, 199)
    for i, name in enumerate(PSI):
        axes[0, 0].plot(q, target(q, args.tau, PSI[name]), color=COLOURS[i], linestyle=STYLES[i % 4], label=name)
    values, where = p.unique(return_inverse=True)
    reached = torch.bincount(where, h) / torch.bincount(where)
    axes[0, 0].plot(values, reached, ".", color="black", label=f"reached: {args.psi}")
    axes[0, 0].set(xlabel="p = P(chosen preferred)", ylabel=f"target, nats (tau {args.tau:g})",
                   ylim=(-2.2 / args.tau, 2.2 / args.tau))
    figure.legend(loc="outside right center")
    save_picture(figure, f"{args.out}/psi.png")


# ---------------------------------------------------------------------------------------------------------- the program

def stopwatch():
    """(lap, seconds): lap(stage) charges the time since the last lap to that stage of the dict `seconds`."""
    seconds, begin = {}, time.perf_counter()

    def lap(stage):
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begin - sum(seconds.values())
    return lap, seconds


def prepare(args, generator, start):
    """(world or None, rows: a world's or the training pairs', held-out pairs or None, tokenizer, model, what else
    `start` holds): the model is that of `start`, a file, folder or hub id, if it is not ''."""
    saved, extra = M.load_model(start) if start else (None, {})
    needs, world, held = D.WORLDS.get(args.data), None, None
    if saved:
        vars(args).update({size: getattr(saved.config, size) for size in SIZES}, tokenizer=extra["tokenizer"])
        if args.tokenizer != needs if needs else args.tokenizer in D.WORDS:
            raise D.Refused(f"--init_from {args.init_from}: its model is for tokenizer {args.tokenizer!r}, which does "
                            f"not fit --data {args.data}; start from a run on data of the same kind")
    source = D.read_jsonl(args.data) if args.task == "file" else None
    tokenizer = D.get_tokenizer(needs or args.tokenizer, saved.config.vocab_size if saved else 0)
    if saved and not needs and tokenizer.n_vocab > saved.config.vocab_size:
        raise D.Refused(f"--init_from {args.init_from}: its tokenizer has {tokenizer.n_vocab:,} ids, its model reads "
                        f"only {saved.config.vocab_size:,}; use the tokenizer that it was trained with")
    if needs:
        world = D.build_world(args.data)
        data, config = world.data, M.GPTConfig(world.block_size, world.vocab_size, head_size=world.head_size)
    else:
        config = M.GPTConfig(args.block_size, tokenizer.n_vocab)
        data, held = D.split(D.encode(source, tokenizer, config.block_size), args.holdout, generator)
        print(f"data: {len(data.p):,} pairs to train on, {len(held.p):,} held out; no prompt is in both")
    vars(config).update({size: getattr(args, size) for size in SIZES if size != "block_size"})
    return world, data, held, tokenizer, M.place(saved or M.GPT(config), args.device, args.grad_checkpoint), extra


FILES = ("config.json", "ref.pt", "ckpt.pt", "metrics.jsonl", "report.json", "runs.png", "actions.png", "psi.png")


def refuse_taken(folders, args):
    """Raises D.Refused if one of these folders holds a run that is neither gone on with nor to be replaced, or --export
    names a folder with a model in it, or the one that training starts from."""
    real = os.path.realpath
    if args.export and os.path.isdir(args.init_from) and real(args.export) == real(args.init_from):
        raise D.Refused(f"--export {args.export}: --init_from is the same folder; name another")
    left = [name for name in FILES if name != "config.json"]  # which a run that was stopped early leaves, alone
    taken = [folder for folder in folders if any(os.path.exists(f"{folder}/{name}") for name in left)]
    if args.export and os.path.exists(f"{args.export}/config.json") and not args.overwrite and not args.resume:
        raise D.Refused(f"--export {args.export}: holds a model; replace it (--overwrite) or name another folder")
    if taken and not args.overwrite and not args.resume and M.process()[0] == 0:
        raise D.Refused(f"--out {taken[0]}: holds a run; go on with it (--resume), replace it (--overwrite) or name "
                        "another folder")


def write_json(path, value):
    """In one step: whatever interrupts it, the file is the old one or the new one."""
    if M.process()[0] == 0:
        with open(f"{path}.tmp", "w") as file:
            json.dump(value, file, indent=1)
        os.replace(f"{path}.tmp", path)


def open_folders(runs, need=0):
    """Makes the --out of each run (of a grid: the whole first), with room for `need` bytes, removes an earlier run's
    files (--overwrite) and writes the flags. Raises D.Refused before anything is changed."""
    if M.process()[0]:
        return
    try:
        for folder in filter(None, (folder for one in runs for folder in (one.out, one.export))):
            os.makedirs(folder, exist_ok=True)  # all of them, before anything is written
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
            if any(os.path.isdir(f"{folder}/{name}") for name in FILES):  # else --overwrite would stop half-way
                raise IsADirectoryError(21, "holds a folder of the name of one of a run's files")
        folder = runs[0].out
        if (free := shutil.disk_usage(folder).free) < need:
            raise D.Refused(f"--out {folder}: {free / 2**30:.2f} GiB are free and checkpoints take up to "
                            f"{need / 2**30:.2f}; make room or name a folder on another disk")
        for one in runs:
            folder = one.out
            for name in FILES if one.overwrite and not one.resume else ():
                with contextlib.suppress(FileNotFoundError):
                    os.remove(f"{folder}/{name}")
            write_json(f"{folder}/config.json", vars(one) | {"torch": torch.__version__})
    except OSError as error:
        raise D.Refused(f"{folder}: {error.strerror}; name a folder that can be written (--out, --export)") from None


def fit_reference(model, world, data, args, generator):
    """SFT on a world's base distribution, or on all responses of a file, rejected ones too."""
    if args.sft_steps:
        n = 2 * args.batch_size
        rows = world.sample(n * args.sft_steps, generator) if world else data.pair_rows()
        bar = tqdm(D.batches(len(rows), n, args.sft_steps, generator), "sft", args.sft_steps, disable=None, leave=False)
        first, last = M.finetune(model, data, rows, bar, args.sft_steps, args.sft_lr, args.dtype, args.accum)
        print(f"sft: {args.sft_steps} steps, {first:.3f} -> {last:.3f} nats per response token")


def reference(model, data, rows, args):  # -> (R,)
    """The log-probs of these rows, the reference from now on; 0 for the others."""
    logp = M.score(model, data, rows, 8 * args.batch_size, args.dtype, args.logp == "mean")
    return logp.new_zeros(len(data.prompt_len)).index_copy(0, rows, logp)


def pose(model, world, args, generator):
    """(log ref (X,Y), pairs): what the reference says in a world, and the pairs drawn there."""
    ref, seen = distribution(model, world, args), args.steps * args.batch_size / args.pairs
    noisy = args.labels == "hard" and (args.noise or world.name != "deterministic")
    print(f"world {world.name}: {ref.shape[0]} prompts x {ref.shape[1]} responses, whose probabilities sum to "
          f"{ref.exp().sum(-1).mean():.6f}; KL(base||ref) {D.kl(world.base.log(), ref):.4f} nats\n"
          f"pairs: {args.pairs:,} {args.labels}, each seen {seen:.2f} times"
          + "; hard labels seen often are learned with their noise" * bool(seen > 2 and noisy))
    return ref, world.draw(args.pairs, response_distribution(ref, args), args.labels, args.noise, generator)


class Solved(NamedTuple):
    """The exact side of a world, for one loss and tau. A policy is its log-probs (X,Y)."""
    evaluate: Callable  # policy -> dict of exact numbers
    expected: dict      # what theory expects of them: the optimum's, and if it is another that of the labels' policy
    final: torch.Tensor  # (X,Y) where the labels lead
    ratios: Callable    # policy -> (2N,) log pi/ref of the pairs' responses, as the loss sees them


def solve(world, ref, pairs, args):
    """-> Solved, for training on `pairs`."""
    mu, best, fit = theory(world, ref, args)
    rows, likelier = pairs.pair_rows(), (pairs.p - 0.5).sign()
    length = world.length.flatten()[rows] if args.logp == "mean" else 1
    ratios = lambda logp: (logp - ref * (args.loss != "simpo")).flatten()[rows] / length

    def evaluate(logp):
        h = (margin(ratios(logp), 0) * likelier).mean().item()
        numbers = D.exact(logp, ref, best, fit, world.pstar, mu, worth(args), args.tau)
        return numbers | {"h": h if math.isfinite(h) else None}

    expected = {"optimum": evaluate(best)} | ({} if fit is None else {"labels": evaluate(fit)})
    return Solved(evaluate, expected, best if fit is None else fit, ratios)


class Problem(NamedTuple):
    """What the runs of a grid share; a world has no held-out pairs, a file no ref."""
    world: D.World | None
    ref: torch.Tensor | None   # (X,Y) log ref
    pairs: D.PairData          # N, to train on
    held: D.PairData | None
    ref_logp: torch.Tensor     # (R,)
    tokenizer: object          # a tiktoken encoding, or D.HuggingFaceTokenizer
    digest: str                # of the data and the model that training starts from


def train_one(model, problem, args, generator, write):
    """One loss at one tau, from the reference or (--resume) from the last checkpoint; calls write(line) at every logged
    step. Returns (report, the lines, seconds per stage)."""
    world, ref, pairs, held, ref_logp, tokenizer, _ = problem
    digest = state_digest(problem.digest, args)
    lap, seconds = stopwatch()
    evaluated, kind = (held, "eval") if held and len(held.p) else (pairs, "eval of the training pairs")
    if world:
        exact = solve(world, ref, pairs, args)
        evaluate = lambda: exact.evaluate(distribution(model, world, args))
        if args.loss == "ipo":  # pi* averages contradictory pairs: its margins are not the targets
            n = measure(exact.ratios(exact.final).float(), torch.zeros(()), pairs.p, args.tau, args)
            print(f"expected at the end: loss {n['loss']:.4f}, h {n['h']:+.2f} ± {n['h_std']:.2f}, win {n['win']:.2f}")
    else:
        ref_shown = ref_logp[evaluated.pair_rows()]
        evaluate = lambda: measure(score_pairs(model, evaluated, args), ref_shown, evaluated.p, args.tau, args)
    print_card(args)
    check_start(model, pairs, ref_logp, args)
    report, rows = {"before": evaluate()}, pairs.pair_rows()
    lines = [{"step": 0, "eval": report["before"]}]
    step_tokens = (pairs.start[rows + 1] - pairs.start[rows]).float().mean().item() * 2 * args.batch_size  # in a step
    prompts = [evaluated.prompt_ids(int(evaluated.chosen[(evaluated.prompt == x).nonzero()[0, 0]]))
               for x in evaluated.prompt.unique()[:3]]
    samples = lambda: [M.continuation(model, x, tokenizer, args) for x in prompts]
    texts = samples()
    token_ref = show_pairs("log ref", model, pairs, tokenizer, args)
    state = load_state(model, f"{args.out}/ckpt.pt", digest) if args.resume else None
    begin = state["step"] if state else 0
    if state:
        lines = state["lines"]
        print(f"resumed after step {begin}" + ", the last; raise --steps to train on" * (begin == args.steps))
        for line in lines[1:]:
            write({"run": [args.loss, args.tau], **line})
    spent = lines[-1].get("seconds", 0.0)  # on training, until now
    lap("evaluation")

    def log(step, numbers):
        lap("training")
        now, extra = evaluate(), f" | {step_tokens * (step - begin) / seconds['training'] / 1e3:.1f}k tok/s"
        M.check_finite(model, LOWER, numbers["loss"], now["kl_ref" if world else "loss"])
        if world:
            gap = math.inf if now["kl_opt"] is None else now["kl_opt"]
            extra = f" | KL {now['kl_ref']:.2f}, to pi* {gap:.4f}" + extra
        log_line("step", step, args, numbers, extra)
        if not world:
            log_line(kind, step, args, now)
        lines.append({"step": step, "seconds": spent + seconds["training"], **numbers, "eval": now})
        write({"run": [args.loss, args.tau], **lines[-1]})
        lap("evaluation")

    def save(step, parts):
        M.check_finite(model, LOWER)
        cuda = torch.cuda.get_rng_state_all() if args.device == "cuda" else []
        M.save_checkpoint(f"{args.out}/ckpt.pt", model, tokenizer=tokenizer.name, step=step, lines=lines, digest=digest,
                          random=[torch.get_rng_state(), *cuda], **{k: v.state_dict() for k, v in parts.items()})

    order = D.batches(len(pairs.p), args.batch_size, args.steps, generator)
    train(model, pairs, ref_logp, torch.full((len(pairs.p),), args.tau), order, args, log, save, state)
    if not world:
        hand_over(model, tokenizer, args)
    report["after"] = evaluate()
    show_pairs("log pi/ref", model, pairs, tokenizer, args, token_ref)
    if world:
        report |= exact.expected
        report_world(report, exact, distribution(model, world, args), problem, args)
    for x, before, after in zip(prompts, texts, samples()):
        print(f"\n{tokenizer.decode(x)[-200:]!r}\n  reference {before!r}\n  policy    {after!r}")
    lap("evaluation")
    return report, lines, seconds


def hand_over(model, tokenizer, args):
    """Prints the peak of memory, and writes the model for Hugging Face's tools to --export, if that is asked for."""
    if peak := M.peak_memory(args.device):
        whose = "of the GPU" if args.device == "cuda" else "the whole process"
        print(f"memory: at most {peak / 2**30:.2f} GiB so far, {whose}")
    if args.export and M.process()[0] == 0:
        M.export(model, args.export, tokenizer.eot_token)
        D.save_tokenizer(tokenizer, args.export)
        print(f"exported for AutoModelForCausalLM.from_pretrained: {args.export}/")


def state_digest(digest, args):
    """What a checkpoint must say to be one of this run."""
    return f"{digest} {args.loss} {args.tau:g} {args.logp}"


def load_state(model, path, digest):
    """What a checkpoint of this run holds beside the weights, which go into the model; None if there is none yet."""
    if not os.path.exists(path):
        return None
    saved, state = M.load_checkpoint(path)
    needed = {"step", "lines", "random", "optimizer", "schedule", "scaler"}
    if state.get("digest") != digest or not needed <= state.keys():
        raise D.Refused(f"--resume: {path} belongs to another run than the ref.pt and flags here; restore it, or start "
                        "anew with --overwrite")
    model.load_state_dict(saved.state_dict())
    torch.set_rng_state(state["random"][0])
    if len(state["random"]) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random"][1:])
    return state


def report_world(report, exact, logp, problem, args):
    """Prints what is known of the trained policy logp (X,Y), and draws its Psi card."""
    print_report(report, args)
    if args.logp == "mean" and args.loss == "ipo":
        gap, tau = nearest(problem.world, problem.ref, logp, args)
        report["nearest"] = {"kl_opt": gap, "tau": tau}
        print(f"--logp mean: of all sums, this is nearest to the pi* of tau {tau:.3f}, KL(pi||pi*) {gap:.4f}")
    if args.labels == "soft":
        reached, due = (margin(exact.ratios(policy), 0) for policy in (logp, exact.final))
        print_card(args, problem.pairs.p, reached, due)
        if args.plot and args.loss == "ipo":
            plot_psi(args, problem.pairs.p, reached)


def run(args):
    """Data and reference, then each loss at each tau, from the same start, on the same pairs in the same order. Of
    several runs each has a folder in --out for its flags and checkpoint."""
    torch.manual_seed(args.seed)
    generator, (lap, seconds), results = torch.Generator().manual_seed(args.seed), stopwatch(), {}
    several = len(args.loss) * len(args.tau) > 1
    name = lambda loss, tau: args.out + f"/{loss}-{tau:g}" * several
    refuse_taken([args.out, *itertools.starmap(name, itertools.product(args.loss, args.tau))], args)
    begun = args.resume and os.path.exists(f"{args.out}/ref.pt")
    if args.resume and not begun:
        print(f"{args.out}/ holds no reference yet; starting from the beginning")
    start = f"{args.out}/ref.pt" if begun else args.init_from
    world, pairs, held, tokenizer, model, extra = prepare(args, generator, start)
    grid = [argparse.Namespace(**vars(args) | {
        "loss": loss, "tau": tau, "logp": "mean" if loss == "simpo" else args.logp, "out": name(loss, tau),
        "command": None if several else args.command})
        for loss, tau in itertools.product(args.loss, args.tau)]
    for one in grid:  # weights from Hugging Face go back there
        theirs = args.init_from and not (args.init_from.endswith(".pt") or os.path.isfile(args.init_from))
        one.export = args.export or f"{one.out}/export" * bool(theirs)
    labels = torch.cat([pairs.p, held.p]) if held else world.pstar if args.labels == "soft" else torch.ones(1)
    for one in grid:
        check_targets(labels, one)
    digest = lambda: M.digest(pairs, held, [torch.tensor(bytearray(name.encode())) for name in model.state_dict()],
                              model.state_dict().values())
    if begun and extra.get("digest") != digest():
        raise D.Refused(f"--resume: --data {args.data} is not what the run in {args.out}/ was made with, or its ref.pt "
                        "has been replaced; restore it, or start anew with --overwrite")
    size = sum(p.numel() * p.element_size() for p in model.parameters())  # of ref.pt; ckpt.pt: 3, and as many as .tmp
    open_folders([args] * several + grid, need=0 if begun else (4 + 3 * len(grid)) * size)
    if not world:
        need = M.memory(model, pairs, -(-args.batch_size // args.accum), args.dtype)
        print(f"memory: about {sum(need.values()) / 2**30:.2f} GiB for the longest batch ("
              + ", ".join(f"{what} {size / 2**30:.2f}" for what, size in need.items()) + ") and what torch takes")
    lap("setup")
    ref = None
    if begun:
        ref_logp = extra["ref_logp"]
        generator.set_state(extra["generator"])
    else:
        fit_reference(model, world, pairs, args, generator)
        ref_logp = reference(model, pairs, torch.arange(len(pairs.prompt_len)), args)  # (R,)
        M.save_checkpoint(f"{args.out}/ref.pt", model, tokenizer=tokenizer.name, ref_logp=ref_logp, digest=digest(),
                          generator=generator.get_state())
    if world:
        ref, pairs = pose(model, world, args, generator)
    lap("reference")
    initial, order = copy.deepcopy(model.state_dict()), generator.get_state()
    unchanged = digest()
    for one in grid if begun else ():  # all are looked at before metrics.jsonl is written anew
        load_state(model, f"{one.out}/ckpt.pt", state_digest(unchanged, one))
    with open(os.devnull if M.process()[0] else f"{args.out}/metrics.jsonl", "w", buffering=1) as metrics:  # 1: by line
        write = lambda line: metrics.write(json.dumps(line) + "\n")
        for one in grid:
            print(f"\n{one.loss}, tau {one.tau:g}" * several)
            model.load_state_dict(initial)
            torch.manual_seed(args.seed)  # for dropout
            problem = Problem(world, ref, pairs, held, ref_logp * (one.loss != "simpo"), tokenizer, unchanged)
            try:
                report, lines, more = train_one(model, problem, one, generator.set_state(order), write)
            except M.Stopped:
                if results:  # what the runs before this one measured
                    finish(results, world, ref, seconds, args)
                raise
            results[one.loss, one.tau] = report, lines
            seconds |= {stage: seconds.get(stage, 0.0) + s for stage, s in more.items()}
    finish(results, world, ref, seconds, args)


def finish(results, world, ref, seconds, args):
    """When all runs are done: their table if there are several, pictures, report.json."""
    reports = {f"{loss}-{tau:g}": report for (loss, tau), (report, _) in results.items()}
    best = frontier(world, ref, args) if world else None
    for report in reports.values() if world else ():
        report["after"]["below"] = np.interp(report["after"]["kl_ref"], *zip(*best)) - report["after"]["win"]
    if len(reports) > 1:
        print_grid(results)
    else:
        reports = reports.popitem()[1]
    if args.plot and M.process()[0] == 0:
        plot_runs(results, best, args)
    write_json(f"{args.out}/report.json", reports | {"seconds": seconds})
    print("\nseconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items())
          + f", total {sum(seconds.values()):.1f}; files in {args.out}/")


def bandit(args):
    """Section 5 of the paper. K taus x S seeds are as many prompts of one tabular policy: a loss trains all at once."""
    torch.set_num_threads(1)
    K, S, (lap, seconds), results = len(args.tau), args.seeds, stopwatch(), {}
    world, one = D.build_bandit(args.data, K * S), D.build_bandit(args.data, S)  # `one`: what belongs to one tau
    ref = -torch.full(one.length.shape, one.head_size).double().log()
    taus = torch.tensor(args.tau).double().repeat_interleave(len(world.data.p) // K)  # (N,)
    for loss in args.loss:
        check_targets(world.data.p, argparse.Namespace(**vars(args) | {"loss": loss}))
    refuse_taken([args.out], args)
    open_folders([args])
    print(f"bandit {args.data}: pairs {D.BANDITS[args.data]} (winner first), uniform reference, {S} seeds")
    for loss in args.loss:
        model = M.Table(*world.length.shape)
        grid = [argparse.Namespace(**vars(args) | {"loss": loss, "tau": tau}) for tau in args.tau]
        ref_logp = distribution(model, world, args).flatten()  # uniform: it cancels, so that SimPO may see it, too
        solved, lines = [solve(one, ref, one.data, a) for a in grid], [[] for _ in grid]
        for a in grid:
            print(f"{loss}, tau {a.tau:g}: ", end="")
            check_start(model, one.data, ref_logp, a)

        def log(step, _):
            policies = distribution(model, world, args).split(S)  # K of (S,Y)
            for a, out, exact, logp in zip(grid, lines, solved, policies):
                n = measure(exact.ratios(logp), torch.zeros(()), one.data.p, a.tau, a)
                M.check_finite(model, LOWER, n["loss"])
                pi, half = logp.exp().mean(0), 1.96 * logp.exp().std(0) / S ** 0.5  # standard errors of the mean
                now = exact.evaluate(logp) | {"pi": pi.tolist(), "interval": half.tolist()}
                out.append({"run": [loss, a.tau], "step": step, **n, "eval": now})

        log(0, None)
        order = D.draws(world.data, args.batch_size, args.steps, torch.Generator().manual_seed(args.seed))
        train(model, world.data, ref_logp, taus, order, grid[0], log)
        for a, out, exact in zip(grid, lines, solved):
            exact.expected["optimum"]["pi"] = exact.final[0].exp().tolist()
            if "labels" in exact.expected:
                print(f"{loss}, tau {a.tau:g}: this Psi is not odd about 1/2; `optimum` below is where its pairs lead")
            results[loss, a.tau] = {"before": out[0]["eval"], "after": out[-1]["eval"]} | exact.expected, out
        lap(f"{loss}, {K * S} policies, {args.steps:,} steps of {args.batch_size or 'all'} pairs")
    print(f"\n{'probabilities':26}{'mean':>10}{'1.96 s.e.':>10}{'optimum':>10}{'difference':>12}")
    for (loss, t), (report, _) in results.items():
        columns = report["after"]["pi"], report["after"]["interval"], report["optimum"]["pi"]
        for action, mean, half, best in zip("abc", *columns):
            print(f"{f'{loss}, tau {t:g}: {action}':26}{mean:10.6f}{half:10.6f}{best:10.6f}{mean - best:+z12.6f}")
    with open(f"{args.out}/metrics.jsonl", "w") as metrics:
        metrics.writelines(json.dumps(line) + "\n" for _, lines in results.values() for line in lines)
    if args.plot:
        plot_actions(results, args)
    finish(results, one, ref, seconds, args)


def bench(args):
    """Times args.steps steps on pairs in file order, at a constant rate, and writes nothing; prints one line of JSON.
    Seconds per step are a median without the first two; total_s is everything but imports. floor_s: what the
    operations that the pairs need take at the rate of large matrix products in this process; padding: its share of
    padded rows."""
    if args.init_from:
        M.quiet_transformers().AutoModelForCausalLM  # transformers imports it now, before the clock starts
    begin = time.perf_counter()
    args.loss, args.tau, args.log_every, args.save_every = args.loss[0], args.tau[0], 1, 0
    args.logp = "mean" if args.loss == "simpo" else args.logp
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    with contextlib.redirect_stdout(sys.stderr):
        world, pairs, _, _, model, _ = prepare(args, generator, args.init_from)
        fit_reference(model, world, pairs, args, generator)
        pairs = pose(model, world, args, generator)[1] if world else pairs
    n = args.steps * args.batch_size
    if n > len(pairs.p):
        raise D.Refused(f"--bench: {args.steps} steps of {args.batch_size} pairs need {n:,} pairs and there are "
                        f"{len(pairs.p):,}; lower --steps or --batch_size")
    pairs = pairs.select(torch.arange(n))
    check_targets(pairs.p, args)
    ref_logp = reference(model, pairs, pairs.pair_rows().unique(), args) * (args.loss != "simpo")
    losses, marks, order = [], [], torch.arange(n).split(args.batch_size)

    def log(step, numbers):
        losses.append(numbers["loss"])
        M.synchronize(args.device)
        marks.append(time.perf_counter())

    prepared = time.perf_counter()
    train(model, pairs, ref_logp, torch.full((len(pairs.p),), args.tau), order, args, log)
    total = time.perf_counter() - begin
    times = np.diff([prepared, *marks])[2 * (args.steps > 2):]
    length = pairs.start.diff()[pairs.pair_rows()].view(2, -1)
    padded = sum(2 * len(part) * length[:, part].max().item() for part in order)
    step = float(np.median(times))
    floor = M.flops(model, pairs, torch.arange(n)) / args.steps / (rate := M.matmul_rate(args.device, args.dtype))
    print(json.dumps({
        "loss": args.loss, "logp": args.logp, "dtype": args.dtype, "batch": args.batch_size, "device": args.device,
        "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in model.parameters()), "step_s": step,
        "pairs_per_s": args.batch_size / step, "tokens_per_s": length.sum().item() / args.steps / step,
        "padding": 1 - length.sum().item() / padded, "before_training_s": prepared - begin, "total_s": total,
        "peak_gib": M.peak_memory(args.device) / 2**30, "matmul_gflops": rate / 1e9, "floor_s": floor,
        "times_floor": step / floor, "losses": losses}))


def sample(args):
    """Prints the prompt of --sample, or each line of standard input, and a continuation by the policy that a finished
    run left in --out, or by the model of --init_from."""
    model, extra = M.load_model(args.init_from or f"{args.out}/ckpt.pt")
    tokenizer, V = D.get_tokenizer(extra["tokenizer"], model.config.vocab_size), model.config.vocab_size
    for text in (line.rstrip("\n") for line in sys.stdin) if args.sample == "-" else [args.sample]:
        try:
            text.encode()
            if args.chat and not hasattr(tokenizer, "chat"):
                raise D.Refused("--chat needs the chat template of a Hugging Face model; leave it out")
            prompt = (tokenizer.chat([{"role": "user", "content": text}], [])[0] if args.chat else
                      getattr(tokenizer, "start", []) + tokenizer.encode_ordinary(text)) or [tokenizer.eot_token]
        except UnicodeEncodeError:
            raise D.Refused(f"--sample {text!a}: not UTF-8; write it in UTF-8") from None
        except D.Refused as error:
            raise D.Refused(f"--sample {text!a}: {error}") from None
        if max(prompt) >= V:
            known = " ".join(repr(tokenizer.decode([i])) for i in range(V) if i != tokenizer.eot_token)
            raise D.Refused(f"--sample {text!r}: holds a word outside this model's vocabulary; it knows {known}")
        if len(prompt) >= model.config.block_size:
            raise D.Refused(f"--sample: {len(prompt)} tokens fill the context of {model.config.block_size}; shorten it")
        print(text + M.continuation(model.to(args.device), prompt, tokenizer, args), flush=True)


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
SAMPLING = ("temperature", "top_k", "top_p", "max_new_tokens")
OWN = {"psi": "ipo", "label_noise": "robust", "gamma": "simpo"}    # flags that one loss alone reads
NA = None  # the flag means nothing for that task, and is refused
TASKS = {"world": "in a synthetic world", "bandit": "in a bandit", "file": "for a JSONL file",
         "sample": "with --sample"}
positive_number, natural, count = number(float, 0, above=True), number(int, 1), number(int, 0)
FLAGS = [  # flag; type or choices; default in a world, in a bandit, for a file, for --sample; meaning and unit
    ("data", str, "bt", "", NA, NA,
     f"a world ({', '.join(D.WORLDS)}), a bandit ({', '.join(D.BANDITS)}) or a JSONL file of preference pairs"),
    ("sample", str, NA, NA, NA, "", "print a continuation of this prompt (-: of each line of standard input)"),
    ("out", str, "out", "out", "out", "out", "folder of the run's files; several runs: a folder in it for each"),
    ("init_from", str, "", NA, "", "",
     "model to start from and stay near: a run's ref.pt or ckpt.pt; for a file also a folder that transformers saved "
     "or a model of its hub, such as gpt2; '': none"),
    ("export", str, NA, NA, "", NA,
     "folder for the policy in Hugging Face's format; '': with weights from there OUT/export, else none"),
    ("loss", list(LOSSES), ["ipo"], ["ipo"], ["ipo"], NA, "loss on the margin; several: a run each, one reference"),
    ("tau", number(float, 1e-6, 1e6), [0.2], [0.1, 0.5, 1.0], [0.1], NA,
     "pull to the reference, DPO's beta; target: 1/(2 tau) nats; several: a run each"),
    ("psi", list(PSI), "yours", "yours", "yours", NA, "worth of a preference, for --loss ipo; yours: psi in ipo.py"),
    ("label_noise", number(float, 0, 0.49), 0.1, 0.1, 0.1, NA, "share of flipped labels that --loss robust assumes"),
    ("gamma", number(float, 0), 0.1, 0.1, 0.05, NA, "what --loss simpo asks for beyond tau h > 0"),
    ("logp", ["sum", "mean"], "sum", NA, "sum", NA, "log pi(y|x): the paper's sum over tokens, or their mean"),
    ("labels", ["hard", "soft"], "hard", NA, NA, NA, "hard: a coin flip with p*, winner first; soft: p* itself"),
    ("noise", number(float, 0, 1), 0.0, NA, NA, NA, "probability that a hard label is flipped"),
    ("mu", ["uniform", "ref"], "uniform", NA, NA, NA, "where the responses of the pairs come from"),
    ("pairs", natural, 500_000, NA, NA, NA, "pairs to draw; few, seen often, are learned with their labels' noise"),
    ("seeds", number(int, 2), NA, 10, NA, NA, "policies per tau, each with draws of its own"),
    ("tokenizer", D.TOKENIZERS, NA, NA, "gpt2", NA, "tiktoken's GPT-2 encoding, or plain bytes"),
    ("holdout", number(float, 0, 0.9), NA, NA, 0.1, NA, "share of the prompts whose pairs are held out"),
    ("steps", natural, 2000, 18_000, 200, NA, "steps of preference training"),
    ("batch_size", count, 256, 9, 16, NA, "pairs in a step; more than there are: some come twice; 0, in a bandit: all"),
    ("accum", natural, 1, NA, 1, NA, "parts that a batch is computed in, same gradients, less memory"),
    ("grad_checkpoint", bool, False, NA, False, NA, "compute activations twice instead of keeping them: less memory"),
    ("lr", positive_number, 1.5e-3, 1e-2, 1e-4, NA,
     "peak learning rate: reached in 50 steps or half of all, then down to 0; constant in a bandit with mini-batches"),
    ("sft_steps", count, 200, NA, 400, NA, "maximum-likelihood steps that make the reference (--init_from: 0)"),
    ("sft_lr", positive_number, 3e-3, NA, 1e-3, NA, "peak learning rate of those"),
    ("log_every", natural, 200, 50, 50, NA, "steps from one log line to the next"),
    ("save_every", natural, 500, NA, 100, NA, "steps from one checkpoint to the next; one is made after the last, too"),
    ("resume", bool, False, NA, False, NA, "go on with the run in --out, with its flags; --steps may be raised"),
    ("overwrite", bool, False, False, False, NA, "replace the run in --out, which is refused otherwise"),
    ("plot", bool, False, False, False, NA, "draw the runs, and what they must reach, as PNG files in --out"),
    ("bench", bool, False, NA, False, NA, "time the steps, in file order at a constant rate; a line of JSON, no files"),
    ("n_layer", natural, 1, NA, 4, NA, "blocks"),
    ("n_head", natural, 4, NA, 4, NA, "attention heads"),
    ("n_embd", natural, 32, NA, 128, NA, "channels, a multiple of n_head"),
    ("block_size", number(int, 3), NA, NA, 256, NA, "context in tokens; a world fixes its own"),
    ("dropout", number(float, 0, 0.9), 0.0, NA, 0.0, NA, "share of activations dropped in training"),
    ("device", ["auto", "cpu", "cuda", "mps"], "auto", NA, "auto", "auto", "auto: cuda if found, else mps, else cpu"),
    ("dtype", ["float32", "bfloat16", "float16"], "float32", NA, "float32", NA,
     "of matrix products; weights, log-probs: float32"),
    ("seed", number(int, 0, 2**32 - 1), 0, 0, 0, 0, "fixes weights, data, order and samples"),
    ("show", count, 0, NA, 0, NA, "print so many pairs token by token, before training and after"),
    ("chat", bool, NA, NA, NA, False, "the text is a user's message, for the model's chat template"),
    ("temperature", number(float, 0), 1.0, NA, 1.0, 1.0, "of samples; 0 takes the likeliest token"),
    ("top_k", count, 0, NA, 0, 0, "sample from the k likeliest tokens; 0: from all"),
    ("top_p", number(float, 0, 1, above=True), 1.0, NA, 1.0, 1.0, "sample from the fewest tokens that hold this share"),
    ("max_new_tokens", natural, 64, NA, 64, 64, "longest sample"),
]


def parse(argv):
    """The arguments of a run: each flag that was given is honoured or refused by name, with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"ipo.py: {message}\n")  # one line, without the usage
    for flag, kind, *defaults, meaning in FLAGS:
        shown = ", ".join(f"{task}: {value!r}" for task, value in zip(TASKS, defaults) if value is not NA)
        how = {"action": "store_true"} if kind is bool else {"choices" if isinstance(kind, list) else "type": kind}
        how |= {"nargs": "+", "action": "extend"} if flag in ("loss", "tau") else {}
        parser.add_argument(f"--{flag}", **how, help=f"{meaning} [{shown}]")
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        return resumed(given, parser)
    data = given.get("data", "bt")
    task = "sample" if "sample" in given else "world" if data in D.WORLDS else "bandit" if data in D.BANDITS else "file"
    defaults = {flag: values[list(TASKS).index(task)] for flag, kind, *values, meaning in FLAGS}
    for flag in given:
        if defaults[flag] is NA and (flag, task) != ("data", "file"):
            parser.error(f"--{flag} means nothing {TASKS[task]}; leave it out")
    args = argparse.Namespace(task=task, command=list(argv), **defaults | given)
    for flag in given.keys() & {"loss", "tau"}:
        names = [f"{value:g}" if flag == "tau" else value for value in given[flag]]  # what folders are called
        if len(set(names)) < len(names):
            parser.error(f"--{flag} {' '.join(names)}: one value stands twice; leave it out")
    for flag in given.keys() & OWN.keys():
        if OWN[flag] not in args.loss:
            parser.error(f"--{flag} means nothing without --loss {OWN[flag]}; leave it out")
    if not args.out:
        parser.error("--out is empty; name a folder")
    if "logp" in given and args.loss == ["simpo"]:
        parser.error("--logp means nothing for --loss simpo, which is a mean; leave it out")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib; pip install matplotlib, or leave it out")
    if task in ("world", "file") and not args.batch_size:
        parser.error(f"--batch_size 0 means nothing {TASKS[task]}; give a whole number >= 1")
    if task in ("world", "file") and args.accum > args.batch_size:
        parser.error(f"--accum {args.accum}: a batch of {args.batch_size} pairs has not as many parts; lower it")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if processes > 1 and (task in ("bandit", "sample") or args.bench):
        parser.error("several processes (torchrun) are for training in a world or on a file; start it with python")
    if processes > 1 and args.batch_size < processes * args.accum:
        parser.error(f"--batch_size {args.batch_size} is less than --accum {args.accum} x {processes} processes; raise "
                     "it")
    if args.bench:
        if len(args.loss) * len(args.tau) > 1:
            parser.error("--bench times one run; give one --loss and one --tau")
        for flag in given.keys() & {"holdout", "out", "export", "log_every", "plot", "show", *SAMPLING}:
            parser.error(f"--{flag} means nothing with --bench; leave it out")
        args.holdout = 0.0
        args.pairs = given.get("pairs", args.pairs and args.steps * args.batch_size)
    if task == "bandit":  # what its flags do not offer
        vars(args).update(device="cpu", dtype="float32", logp="sum", labels="hard", noise=0.0, mu="uniform", accum=1)
        return args
    if args.init_from:
        args.sft_steps = given.get("sft_steps", 0)
        for flag in given.keys() & {*SIZES, "tokenizer"}:
            parser.error(f"--{flag} is fixed by the checkpoint of --init_from; leave it out")
    if "export" in given and len(args.loss) * len(args.tau) > 1:
        parser.error("--export names one folder for several runs; leave it out, or give one --loss and one --tau")
    if task != "sample" and not args.init_from and args.n_embd % args.n_head:
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


def resumed(given, parser):
    """The arguments of the run in --out, whose command line its config.json holds; only --steps may be raised."""
    out = given.get("out", "out")
    try:
        with open(f"{out}/config.json") as file:
            command = [flag for flag in json.load(file)["command"] if flag != "--overwrite"]
        device = ["--device", given["device"]] if "device" in given else []
        args = parse([*command, *device]) if "--resume" not in command else None
        if args is None or args.task not in ("world", "file") or args.bench:
            raise ValueError("a bandit, say, which leaves no checkpoint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--resume: {out}/config.json is not that of a run ({type(error).__name__}); name the --out of a "
                     "run that has checkpoints (a bandit has none), of a grid the folder of the whole")
    for flag in given.keys() - {"resume", "out", "device"}:
        if flag != "steps" and given[flag] != getattr(args, flag):
            parser.error(f"--{flag} {given[flag]} contradicts the run in {out}/, which has {getattr(args, flag)}; "
                         "leave it out")
    if given.get("steps", args.steps) < args.steps:
        parser.error(f"--steps {given['steps']}: the run in {out}/ has {args.steps}; --resume can only raise them")
    args.command = [*args.command, "--steps", str(given["steps"])] if "steps" in given else args.command
    vars(args).update(resume=True, out=out, steps=given.get("steps", args.steps))
    return args


def main(argv=None):
    """The command line. Exit status 0; 1 if a run had to stop, 2 for bad input, 3 if another process ended, 130 and 143
    after Ctrl-C and SIGTERM, with one line on standard error."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or pipe may lack a sample's characters
    args = parse(sys.argv[1:] if argv is None else argv)

    def interrupt(number):
        raise Interrupted(number, "stopped outside training")

    with signals(interrupt):
        try:
            M.join(args.device)
            if M.process()[0]:
                sys.stdout = open(os.devnull, "w")  # the first process speaks for all
            (bench if args.bench else {"sample": sample, "bandit": bandit}.get(args.task, run))(args)
            if M.process()[1] > 1:
                torch.distributed.destroy_process_group()
            return 0
        except (D.Refused, M.BadCheckpoint) as error:
            status, message = 2, error
        except M.Stopped as error:
            status, message = 1, error
        except OSError as error:  # a disk that fills up between checkpoints, an output pipe that closes
            status, message = 1, f"{error.filename or args.out}: {error.strerror}; what was saved before stays"
        except Interrupted as error:
            status, message = 128 + error.args[0], error.args[1]
        except RuntimeError as error:
            if M.process()[1] == 1:
                raise
            status, message = 3, f"process {M.process()[0]}: another has ended ({str(error).splitlines()[0][:80]})"
    saved = os.path.exists(f"{args.out or ''}/ref.pt")
    how = f"; go on with: python ipo.py --resume --out {args.out}" if saved else "; nothing is saved yet"
    if saved and args.overwrite:  # it may have been stopped before it replaced anything
        how = f"; python ipo.py --resume --out {args.out} goes on with the run whose flags {args.out}/config.json holds"
    print(f"ipo.py: {message}" + how * (status > 2), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
