"""Where does reinforcement learning from a reward end, and where if its KL is put in wrongly?

The objective E_pi[r] - tau KL(pi||ref) has the exact answer ref exp(r/tau) / Z. RLOO (Ahmadian et al. 2024):
draw k responses to each prompt; R = r - tau log(pi/ref) of each, a number without gradient, less the mean R
of the others, times grad log pi. --clip and --epochs make it PPO's surrogate (Schulman et al. 2017).
  --kl reward  as above
  --kl grad    the mean of log(pi/ref) in the loss, differentiated: its gradient is 0 on average, so
               nothing pulls back: all goes to the best response
  --kl k3      ref/pi - 1 - log(ref/pi) in the loss: the gradient of KL(ref||pi), it ends at tau ref/(nu-r)
--reward true takes the world's own reward, model learns r-hat from its pairs (lab/methods/reward.py). With --data
FILE responses are sampled token by token (lab/methods/rollout.py) and judged by a reward model of the file's pairs.
  python -m lab.methods.rlhf [--reward model] [--tau 0.2] [--kl k3] [--clip 0.2 --epochs 4]
  python -m lab.methods.rlhf --data FILE --init_from gpt2
Trap: a mean that holds the sample itself makes the gradient (k-1)/k as large; Adam hides it.
Answer: RLOO .0000 .0001 .0000, PPO .0010 .0011 .0009 nats from the exact answer (bt, tau .5, seeds 0 to 2);
with a learned reward .011 .017 .031, of which RLOO makes at most .0008; grad ends 2.7, k3 1.8 nats off.
"""
import copy
import sys

import torch

import data
import ipo
from lab.common import exact
from lab.methods import reward, rollout
from lab.common import start as begin


class Enumerated:
    """Responses of a world, drawn from the policy's table and judged by rewards r (X,Y)."""

    def __init__(self, world, r, args):
        self.world, self.r, self.args, self.table = world, r, args, exact.Table(world)
        self.exact = {"": answer(world.ref, r, args), "_rlhf": reward.best_policy(world.ref, r, args.tau),
                      "_true": reward.best_policy(world.ref, reward.truth(world), args.tau)}

    @torch.no_grad()
    def draw(self, policy, generator):  # -> rollout.Drawn
        y = rollout.pick(self.table(policy).exp(), self.args.k, generator)
        return rollout.Drawn(y, self.world.ref.gather(1, y).float(), self.r.gather(1, y).float())

    def logp(self, policy, y):  # -> (X,k), differentiable
        return self.table(policy).gather(1, y)

    @torch.no_grad()
    def numbers(self, policy):
        """Exact: kl to where this way of counting KL ends, kl_rlhf to ref exp(r/tau) / Z, kl_true to that of
        the true reward; best: the mass on the response of the highest reward."""
        logp, world = self.table(policy).double(), self.world
        wins = exact.against(world.pstar, world.mu)
        best = self.r == self.r.amax(-1, keepdim=True)
        means = {"reward": self.r, "win": wins, "best": best}
        found = {name: (logp.exp() * value).sum(-1).mean() for name, value in means.items()}
        found["kl_ref"] = data.kl(logp, world.ref)
        return data.finite(found | {"kl" + name: data.kl(logp, to) for name, to in self.exact.items()})


def baseline(value):  # (P,k) -> (P,k)
    """The mean of the prompt's other samples: it must not hold the sample itself."""
    return (value.sum(1, keepdim=True) - value) / (value.shape[1] - 1)


def loss(logp, old_logp, drawn, args):  # (P,k), (P,k) -> ()
    """At logp = old_logp its gradient is RLOO's, minus the mean of (R - baseline) grad log pi."""
    log_ratio = logp - drawn.ref_logp
    value, penalty = drawn.reward, 0.0
    if args.kl == "reward":
        value = value - args.tau * (old_logp - drawn.ref_logp)  # a number: no gradient
    if args.kl == "grad":
        penalty = log_ratio
    if args.kl == "k3":
        penalty = (-log_ratio).exp() - 1 + log_ratio
    advantage = value - baseline(value)
    ratio = (logp - old_logp).exp()
    gain = ratio * advantage
    if args.clip:
        gain = gain.minimum(ratio.clamp(1 - args.clip, 1 + args.clip) * advantage)
    return (args.tau * penalty - gain).mean()


def answer(ref_logp, r, args):  # (X,Y), (X,Y) -> (X,Y)
    """log pi where this way of counting KL ends."""
    top = r.amax(-1, keepdim=True)
    if args.kl == "grad":  # E grad log pi = 0: nothing pulls back
        return torch.zeros_like(r).masked_fill(r < top, -torch.inf).log_softmax(-1)
    if args.kl == "k3":  # tau ref / (nu - r): nu by bisection, as its sum falls from infinity to below 1
        low, high = top, top + args.tau
        for _ in range(200):
            nu = (low + high) / 2
            much = (args.tau * ref_logp.exp() / (nu - r)).sum(-1, keepdim=True) > 1
            low, high = torch.where(much, nu, low), torch.where(much, high, nu)
        return (ref_logp - (nu - r).log()).log_softmax(-1)
    return reward.best_policy(ref_logp, r, args.tau)


def train(policy, task, args):
    """RLOO; with --epochs above 1 PPO's way, several steps on the same samples."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    optimizer, lines = ipo.adamw(policy), []
    for step in range(1, args.steps + 1):
        fresh = (step - 1) % args.epochs == 0
        if fresh:
            drawn = task.draw(policy, generator)
        logp = task.logp(policy, drawn.where)
        if fresh:
            old_logp = logp.detach()
        loss(logp, old_logp, drawn, args).backward()
        ipo.descend(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            batch = {"drawn": drawn.reward.mean().item()}
            begin.keep(policy, lines, step, batch, task.numbers(policy), args)


def rlhf(args):
    """SFT, the reward, reinforcement learning. Returns (policy, task)."""
    policy, source, _, generator = begin.start(args)
    world = args.data in data.WORLDS
    judge = None
    if args.reward == "model":
        judge = reward.fit(policy, source, args, generator)
        reward.save(f"{args.out}/reward.pt", judge)
        print("reward model:", begin.told(reward.numbers(judge, source, args)))
    if world:
        r = reward.rewards(judge, source, args) if judge else reward.truth(source)
        task = Enumerated(source, r, args)
    else:
        task = rollout.Sampled(source, copy.deepcopy(policy), judge, args)
        rows = source.pairs.chosen[source.eval][:2]  # whose samples are shown
        task.show(policy, rows)
    print("before:", begin.told(task.numbers(policy)))
    train(policy, task, args)
    if not world:
        task.show(policy, rows)
    return policy, task


def parse(argv, doc=__doc__):
    parser = rollout.flags(doc)
    parser.add_argument("--reward", choices=["true", "model"], default="true", help="file: model [true]")
    parser.add_argument("--kl", choices=["reward", "grad", "k3"], default="reward", help="see above [reward]")
    parser.add_argument("--clip", type=float, default=0.0, help="PPO's; 0: none [0]")
    parser.add_argument("--epochs", type=int, default=1, help="steps on the same samples [1]")
    args = begin.parse(
        parser, argv, "--steps 1000 --lr 3e-3 --tau 0.5 --reward_lr 3e-3 --out out/rlhf",
        "--reward model --k 8 --lr 3e-5 --reward_lr 1e-4 --reward_steps 200 --log_every 20 --out out/rlhf")
    if args.k < 2 or args.epochs < 1 or args.prompts < 1 or args.longest < 1:
        raise data.Refused("--k must be at least 2, --epochs, --prompts and --longest at least 1")
    if args.data in data.WORLDS:
        args.device = "cpu"  # tables of a world are small
    elif args.reward == "true":
        raise data.Refused("--reward true: a file has no true reward; leave it out")
    return args


def run(argv):
    args = parse(argv)
    policy, task = rlhf(args)
    return args, task.numbers(policy)


if __name__ == "__main__":
    sys.exit(begin.report("rlhf", run, sys.argv[1:]))
