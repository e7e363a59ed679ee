"""Where does reinforcement learning from a reward end? And where, if its KL is put in wrongly?

The objective E[r] - tau KL(pi||ref) has the exact answer ref exp(r/tau) / Z. RLOO (Ahmadian et al. 2024) draws
k responses to each prompt. Of each it takes R = r - tau log(pi/ref), a number without gradient, less the mean R
of the other k - 1, times the gradient of log pi. --clip and --epochs make PPO's surrogate of it (Schulman et
al. 2017).

  --kl reward   as above
  --kl grad     the mean of log(pi/ref) is differentiated in the loss; its gradient is 0 on average, so nothing
                pulls back, and all goes to the best response
  --kl k3       ref/pi - 1 - log(ref/pi) in the loss; its gradient is that of KL(ref||pi), which has another
                answer, tau ref / (nu - r)

  python -m lab.methods.rlhf                               the world's own reward
  python -m lab.methods.rlhf --reward model --tau 0.5      a reward learned from pairs (reward_model.py)
  python -m lab.methods.rlhf --kl k3
  python -m lab.methods.rlhf --compare --tau 0.5           RLHF, DPO and IPO with Psi = logit, from one reference

--compare checks proposition 1 of Azar et al.: under Bradley-Terry the three have one optimum. It uses soft
labels, since with hard ones IPO with Psi = logit has no finite target.
Trap: a baseline that holds the sample itself makes the gradient (k-1)/k as large, which Adam hides.
"""
import copy
import itertools
import sys
from pathlib import Path

import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.methods import reward_model
from lab.methods.reward_model import best_policy, refuse_given


def baseline(value):  # (X,k) -> (X,k)
    """The mean of the prompt's other samples."""
    return (value.sum(1, keepdim=True) - value) / (value.shape[1] - 1)


def loss(logp, old_logp, ref_logp, reward, args):  # (X,k) each -> ()
    """At logp = old_logp its gradient is RLOO's, minus the mean of (R - baseline) grad log pi."""
    log_ratio = logp - ref_logp
    penalty = 0.0
    if args.kl == "reward":
        reward = reward - args.tau * (old_logp - ref_logp)  # a number, without gradient
    if args.kl == "grad":
        penalty = log_ratio
    if args.kl == "k3":
        penalty = (-log_ratio).exp() - 1 + log_ratio
    advantage = reward - baseline(reward)
    ratio = (logp - old_logp).exp()
    gain = ratio * advantage
    if args.clip:
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        gain = gain.minimum(clipped * advantage)
    return (args.tau * penalty - gain).mean()


def answer(ref_logp, r, args):  # (X,Y), (X,Y) -> (X,Y)
    """log pi where this way of counting KL ends."""
    if args.kl == "reward":
        return best_policy(ref_logp, r, args.tau)
    top = r.amax(-1, keepdim=True)
    if args.kl == "grad":  # nothing pulls back
        return torch.zeros_like(r).masked_fill(r < top, -torch.inf).log_softmax(-1)
    low, high = top, top + args.tau  # nu by bisection: the sum falls from infinity to below 1
    for _ in range(200):
        nu = (low + high) / 2
        total = (args.tau * ref_logp.exp() / (nu - r)).sum(-1, keepdim=True)
        low = torch.where(total > 1, nu, low)
        high = torch.where(total > 1, high, nu)
    return (ref_logp - (nu - r).log()).log_softmax(-1)


def train(policy, world, r, args):
    """RLOO on rewards r (X,Y). With --epochs above 1 several steps on the same samples, as PPO takes them."""
    table, optimizer, random = exact.Table(world), ipo.adam(policy), ipo.generator(args, 4)
    ref, end = world.exact["ref"], answer(world.exact["ref"], r, args)
    for step in range(1, args.steps + 1):
        logp = table(policy)  # (X,Y)
        if not logp.isfinite().all():
            raise ipo.Stopped(f"step {step}: the policy is not finite; lower --lr or raise --tau")
        if (step - 1) % args.epochs == 0:
            old = logp.detach()
            y = torch.multinomial(old.exp(), args.k, replacement=True, generator=random)  # (X,k)
        value = loss(*(each.gather(1, y) for each in (logp, old, ref, r)), args)
        value.backward()
        ipo.optimizer_step(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0:
            reward = (logp.exp() * r).sum(-1)
            ipo.told(f"RLHF {step}/{args.steps}", ipo.means({"reward": reward, "kl_answer": data.kl(logp, end)}))
    model.save(f"{args.out}/ckpt.pt", policy, args, step=args.steps)


def others(reference, world, args):
    """{name: log pi (X,Y)} of DPO and of IPO's loop with Psi = logit, from this reference, on the world's pairs."""
    tables, psi = {}, ipo.psi
    mine = copy.copy(args)
    mine.steps, mine.lr = args.reward_steps, ipo.parse([]).lr
    try:
        ipo.psi = torch.logit
        for name, mine.loss in (("DPO", "dpo"), ("IPO, Psi = logit", "ipo")):
            Path(args.out, "ckpt.pt").unlink(missing_ok=True)  # or ipo.train would go on from there
            print(f"{name}:")
            policy = copy.deepcopy(reference)
            ipo.train(policy, ipo.shuffled_batches(world, mine), mine, lambda policy: {})
            tables[name] = world.table(policy)
    finally:
        ipo.psi = psi
    return tables


def compare(tables, args):
    """The answer of --compare and its figures, from {name: log pi (X,Y)}."""
    figures = {}
    for (name, logp), (other, theirs) in itertools.combinations(tables.items(), 2):
        figures[f"{name} and {other}"] = max(data.kl(logp, theirs).item(), data.kl(theirs, logp).item())
    far = max(figures.values())
    verdict = "Yes" if far <= 0.001 else "Not yet"
    text = (f"{verdict}: after training, RLHF, DPO, IPO with Psi = logit and the exact optimum are at most "
            f"{far:.5f} nats from one another, at tau {args.tau}.")
    return text, figures


def parse(argv):
    own = start.parser(__doc__)
    own.add_argument("--reward", choices=["true", "model"], default="true", help="whose reward [true]")
    own.add_argument("--kl", choices=["reward", "grad", "k3"], default="reward", help="see above [reward]")
    own.add_argument("--k", type=int, default=64, help="samples of each prompt in a step [64]")
    own.add_argument("--clip", type=float, default=0.0, help="PPO's; 0 is none [0]")
    own.add_argument("--epochs", type=int, default=1, help="steps on the same samples [1]")
    own.add_argument("--reward_steps", type=int, default=2000, help="of the reward model [2000]")
    own.add_argument("--reward_lr", type=float, default=3e-3, help="its peak learning rate [0.003]")
    own.add_argument("--compare", action="store_true", help="RLHF, DPO and IPO's loop at one policy?")
    args = reward_model.parse(own, argv, "--steps 1000 --lr 3e-3 --out out/rlhf")
    if args.k < 2 or args.epochs < 1 or args.reward_steps < 1:
        raise data.Refused("--k takes 2 or more, --epochs and --reward_steps 1 or more")
    if args.compare:
        refuse_given(argv, ("data", "labels", "reward", "kl"), "is chosen by --compare, or the three optima differ")
        args.reward, args.labels = "model", "soft"
    if args.reward == "true":
        idle = ("reward_steps", "reward_lr", "pairs", "labels", "mu", "batch_size")
        refuse_given(argv, idle, "does nothing without --reward model")
    return args


def run(argv):
    args = parse(argv)
    policy, world = start.start(args)
    tables = others(policy, world, args) if args.compare else {}
    ref, r = world.exact["ref"], world.reward
    right = best_policy(ref, r, args.tau)
    if args.reward == "model":
        judge = reward_model.fit(policy, world, args, args.reward_steps, args.reward_lr, ridge=0.0)
        r = reward_model.table(judge, world)
    train(policy, world, r, args)
    logp, wanted = world.table(policy), best_policy(ref, r, args.tau)
    if args.compare:
        start.finish(args, *compare({"RLHF": logp, **tables, "exact": right}, args))
        return
    figures = ipo.means({
        "KL to its own answer": data.kl(logp, answer(ref, r, args)),
        "KL to ref exp(r/tau)/Z": data.kl(logp, wanted),
        "... of the true reward": data.kl(logp, right),
        "kl_ref": data.kl(logp, ref),
        "win": exact.win(logp, world.pstar, world.mu),
        "mean true reward": (logp.exp() * world.reward).sum(-1),
        "mass on the best": (logp.exp() * (r == r.amax(-1, keepdim=True))).sum(-1),
    })
    start.finish(args, said(figures, data.kl(wanted, right), args), figures)


def said(figures, apart, args):
    """The answer of a run. apart: from the best policy for this reward to that for the true one."""
    method = "PPO" if args.clip or args.epochs > 1 else "RLOO"
    text = f"{method} ends {figures['KL to ref exp(r/tau)/Z']:.4f} nats from ref exp(r/tau)/Z, at tau {args.tau}."
    if args.kl == "k3":
        text += f" With k3 its answer is another, tau ref/(nu - r), {figures['KL to its own answer']:.4f} nats away."
    if args.kl == "grad":
        text += f" Nothing pulls it back: {figures['mass on the best']:.1%} are on the response of highest reward."
    if args.reward == "model":
        text += f" The learned reward itself puts that answer {apart:.4f} nats from the true reward's."
    return text


if __name__ == "__main__":
    sys.exit(start.main("rlhf", run))
