"""Where does RLHF, reinforcement learning from a reward, end? And where, if its KL is put in wrongly?

The objective E[r] - tau KL(pi||ref) has the exact answer ref exp(r/tau) / Z. RLOO (Ahmadian et al. 2024)
draws k responses to each prompt. Of each it takes R = r - tau log(pi/ref), a number without gradient. R less
the mean R of the other k - 1 is multiplied by the gradient of log pi.

  --kl reward   as above
  --kl k3       ref/pi - 1 - log(ref/pi) in the loss; its gradient is that of KL(ref||pi), which has another
                answer, tau ref / (nu - r)

  python -m lab.methods.rlhf                          the world's own reward
  python -m lab.methods.rlhf --kl k3
  python -m lab.methods.rlhf --compare --tau 0.5      RLHF, DPO and IPO with Psi = logit: one policy?

--compare learns the reward from pairs, each of the four trainings for --steps. (--lr is RLHF's; the others
have the rates of reward_model and ipo.py.) It checks proposition 1 of Azar et al.: under Bradley-Terry the
three have one optimum. It uses soft labels, since with hard ones IPO with Psi = logit has no finite target.
Without --compare the flags --pairs, --mu and --batch_size are refused.
Traps: at --lr 3e-3 one run of three gives up a group of responses early; its samples then hold none of them,
so they hardly come back (those of two words, in all 2 % of the answer). A baseline that holds the sample
itself makes the gradient (k-1)/k as large, which Adam hides.
"""
import copy
import itertools

import torch

import data
import ipo
from lab.common import exact, start
from lab.methods.margin_losses import rebel
from lab.methods.reward_model import best_policy, fit, table, taught


def baseline(value):  # (X,k) -> (X,k)
    """The mean of the prompt's other samples."""
    return (value.sum(1, keepdim=True) - value) / (value.shape[1] - 1)


def loss(logp, ref_logp, reward, args):  # (X,k) each -> ()
    """Its gradient is RLOO's, minus the mean of (R - baseline) grad log pi."""
    log_ratio, penalty = logp - ref_logp, 0.0
    if args.kl == "k3":
        penalty = (-log_ratio).exp() - 1 + log_ratio
    else:
        reward = reward - args.tau * log_ratio.detach()
    advantage = reward - baseline(reward)
    return (args.tau * penalty - advantage * logp).mean()


def answer(ref_logp, r, args):  # (X,Y), (X,Y) -> (X,Y)
    """log pi where this way of counting KL ends."""
    if args.kl == "reward":
        return best_policy(ref_logp, r, args.tau)
    top = r.amax(-1, keepdim=True)
    low, high = top, top + args.tau  # nu by bisection: the sum falls from infinity to below 1
    for _ in range(200):
        nu = (low + high) / 2
        total = (args.tau * ref_logp.exp() / (nu - r)).sum(-1, keepdim=True)
        low = torch.where(total > 1, nu, low)
        high = torch.where(total > 1, high, nu)
    return (ref_logp - (nu - r).log()).log_softmax(-1)


def losses(policy, world, r, args):
    """Yields the loss of each step's samples, on rewards r (X,Y)."""
    read, random, ref = exact.Table(world), ipo.generator(args, 4), world.exact["ref"]
    for _ in range(args.steps):
        logp = read(policy)  # (X,Y)
        y = torch.multinomial(logp.detach().exp(), args.k, replacement=True, generator=random)  # (X,k)
        drawn = [each.gather(1, y) for each in (logp, ref, r)]
        yield loss(*drawn, args)


def losses_of_pairs(policy, world, f, args):
    """Yields the mean of f over each step's pairs."""
    for batch in ipo.shuffled_batches(world, args):
        logp = ipo.sequence_logp(policy, batch.tokens, batch.mask)
        yield f(ipo.margin(logp, batch.ref_logp), batch.p, args.tau).mean()


def others(reference, world, args):
    """{name: log pi (X,Y)} of DPO and of IPO with Psi = logit, which is REBEL, on the world's pairs."""
    tables = {}
    mine = start.changed(args, lr=ipo.parse([]).lr)
    for name, f in {"DPO": ipo.dpo_loss, "IPO with logit": rebel}.items():
        print(f"{name}:")
        policy = copy.deepcopy(reference)
        start.fit(policy, losses_of_pairs(policy, world, f, mine), mine, lambda policy: {})
        tables[name] = world.table(policy)
    return tables


def compare(tables, args):
    """The answer of --compare and its figures, from {name: log pi (X,Y)}."""
    figures = {f"{name}, {other}": max(data.kl(logp, theirs), data.kl(theirs, logp)).item()
               for (name, logp), (other, theirs) in itertools.combinations(tables.items(), 2)}
    text = (f"RLHF, DPO, IPO with Psi = logit and the exact optimum are at most {max(figures.values()):.5f} "
            f"nats from one another, at tau {args.tau}.")
    return text, figures


def parse(argv):
    own = start.parser(__doc__)
    own.add_argument("--kl", choices=["reward", "k3"], default="reward", help="see above [reward]")
    own.add_argument("--k", type=int, default=64, help="samples of each prompt in a step [64]")
    own.add_argument("--compare", action="store_true", help="RLHF, DPO and IPO's loop at one policy?")
    args = start.parse(own, argv, "--steps 1000 --lr 2e-3 --out out/rlhf", ["loss", "labels"], world=True)
    if args.k < 2:
        raise data.Refused("--k takes 2 or more")
    if args.compare:
        start.refuse_given(argv, ["data", "kl"], "is chosen by --compare; else the optima differ")
        args.labels = "soft"
    else:
        start.refuse_given(argv, ["pairs", "mu", "batch_size"], "counts with --compare alone")
    return args


def run(argv):
    args = parse(argv)
    policy, world = start.start(args)
    args.loss = None  # RLHF has none on a margin, and its files should not name one
    ref, r = world.exact["ref"], taught(world)
    right = best_policy(ref, r, args.tau)
    if args.compare:
        tables = others(policy, world, args)
        r = table(fit(policy, world, args, args.steps, lr=3e-3), world)
    end = answer(ref, r, args)
    print("RLHF:")
    start.fit(policy, losses(policy, world, r, args), args, start.distance("kl_answer", world, end))
    logp = world.table(policy)
    if args.compare:
        return start.finish(args, *compare({"RLHF": logp, **tables, "exact": right}, args))
    figures = ipo.means({
        "KL to its exact answer": data.kl(logp, end),
        "KL to ref exp(r/tau)/Z": data.kl(logp, right),
        "KL to the reference": data.kl(logp, ref),
        "win rate": exact.win(logp, world.pstar, world.mu),
    })
    text = f"RLOO ends {figures['KL to ref exp(r/tau)/Z']:.4f} nats from ref exp(r/tau)/Z, at tau {args.tau}."
    if args.kl == "k3":
        text += f" Its own answer with k3, tau ref/(nu - r), is {figures['KL to its exact answer']:.4f} away."
    start.finish(args, text, figures)


if __name__ == "__main__":
    raise SystemExit(start.main("rlhf", run))
