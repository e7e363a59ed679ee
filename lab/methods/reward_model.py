"""What reward do preferences teach?

The first half of RLHF (Christiano et al. 2017, Ouyang et al. 2022): a GPT reads prompt and response, and a
scalar head on the last token of the response is the reward r-hat. It is fitted by Bradley-Terry's likelihood,
-p log s(r_w - r_l) - (1-p) log s(r_l - r_w), which is DPO's loss with gaps of rewards in place of margins.
A constant for each prompt cancels in every gap, so errors are measured after centring on each prompt's mean.

  python -m lab.methods.reward_model                                  the true reward of bt is known
  python -m lab.methods.reward_model --data cyclic                    no reward is true here
  python -m lab.methods.reward_model --data deterministic --ridge 0.01

Traps: the head must not read padding. In `cyclic` r-hat is compared with the fit to endless pairs. In
`deterministic` that fit is infinite, and rewards grow as long as one trains. Few --steps hold them, or --ridge
times (r_w - r_l)^2.
"""
import copy
import sys

import torch
import torch.nn as nn

import data
import ipo
from lab.common import exact, start


class RewardModel(nn.Module):
    """A language model's trunk with a number on top."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.value = nn.Linear(trunk.config.n_embd, 1, bias=False)  # a constant would cancel in every gap
        nn.init.zeros_(self.value.weight)

    def forward(self, tokens, mask):  # (R,T), (R,T) -> (R,)
        """The reward of each row, read at its last response token."""
        position = torch.arange(tokens.shape[1])
        last = (mask * position).argmax(1)               # (R,)
        x = self.trunk.hidden(tokens)                    # (R,T,C)
        return self.value(x[torch.arange(len(x)), last]).squeeze(1)


def cost(gap, p, ridge):  # (...), (...) -> (...)
    """Of a pair whose first response has the greater reward by `gap` and is preferred with probability p."""
    return ipo.dpo_loss(gap, p, 1.0) + ridge * gap ** 2


def fit(policy, world, args, steps, lr, ridge):
    """A RewardModel on a copy of the policy's trunk, trained on the world's pairs."""
    reward = RewardModel(copy.deepcopy(policy))
    optimizer = ipo.adam(reward)
    order = data.shuffled(len(world.train), args.batch_size, steps, ipo.generator(args, 3))
    for step, index in enumerate(order, 1):
        batch = world.pairs.batch(world.train[index])
        winner, loser = reward(batch.tokens, batch.mask).chunk(2)
        gap = winner - loser  # (B,)
        loss = cost(gap, batch.p, ridge).mean()
        loss.backward()
        ipo.optimizer_step(reward, optimizer, step, steps, lr)
        if step % args.log_every == 0:
            ipo.told(f"reward model {step}/{steps}", {"loss": loss.item(), "gap": gap.mean().item()})
    return reward


@torch.no_grad()
def table(reward, world):  # -> (X,Y)
    """r-hat of every response."""
    rows = torch.arange(world.reward.numel())
    return reward(*world.pairs.padded(rows)).view_as(world.reward).double()


def taught(world, args, ridge):  # -> (X,Y)
    """What endless pairs teach. The world's own reward stands for it in deterministic, where it is infinite."""
    if args.data != "cyclic" and not ridge:
        return world.reward

    def loss(logp):  # minimise hands log-probs over, which serve as rewards up to a constant
        gap = exact.margins(logp, torch.zeros_like(logp))
        return exact.expected(cost(gap, 1.0, ridge), world.pstar, world.mu)

    return exact.minimise(loss, torch.zeros_like(world.mu))


def best_policy(ref_logp, reward, tau):  # (X,Y), (X,Y) -> (X,Y)
    """log of ref exp(r/tau) / Z, which maximises E[r] - tau KL(pi||ref)."""
    return (ref_logp + reward / tau).log_softmax(-1)


def spread(reward):  # (X,Y) -> ()
    """The best response's reward less the worst's, a mean over prompts."""
    return (reward.amax(-1) - reward.amin(-1)).mean()


def rmse(reward, other):  # (X,Y), (X,Y) -> ()
    """Root of the mean squared difference, when a constant of each prompt is taken off."""
    error = reward - other
    return (error - error.mean(-1, keepdim=True)).square().mean().sqrt()


def refuse_given(argv, names, why):
    """Raises Refused if one of these flags is in argv, since it would do nothing."""
    words = sys.argv[1:] if argv is None else argv
    given = [word.split("=")[0] for word in words]
    for name in names:
        if f"--{name}" in given:
            raise data.Refused(f"--{name} {why}; leave it out")


def parse(own, argv, defaults="", without=()):
    """As start.parse, for a program whose answers only a world can give: its tables are small and on the CPU."""
    without = ("loss", "device", "dtype", *without)
    args = start.parse(own, argv, f"--device cpu {defaults}", without)
    if args.data not in data.WORLDS:
        worlds = ", ".join(data.WORLDS)
        raise data.Refused(f"--data {args.data}: exact answers are known in a world alone; name one of {worlds}")
    return args


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--ridge", type=float, default=0.0, help="times (r_w - r_l)^2 in the loss [0]")
    args = parse(own, argv, "--out out/reward_model --lr 3e-3")
    policy, world = start.start(args)
    learned = table(fit(policy, world, args, args.steps, args.lr, args.ridge), world)
    right = taught(world, args, args.ridge)
    error = rmse(learned, right).item()
    far = data.kl(*(best_policy(world.exact["ref"], r, args.tau) for r in (learned, right))).item()
    ranges = f"its rewards span {spread(learned):.1f} from the worst response to the best"
    answer = (f"In {args.data} the learned reward is {error:.3f} off (root mean square), and {ranges}. The best "
              f"policy for it is {far:.4f} nats from the best policy for the right one, at tau {args.tau}.")
    if args.data == "deterministic" and not args.ridge:
        answer = (f"Certain preferences teach no finite reward. After {args.steps} steps {ranges}, and they "
                  "grow as long as one trains.")
    figures = {"RMSE": error, "span of rewards": spread(learned).item(),
               "span of the right ones": spread(right).item(), "KL between best policies": far}
    start.finish(args, answer, figures)


if __name__ == "__main__":
    sys.exit(start.main("reward_model", run))
