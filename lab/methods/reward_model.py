"""What reward do preferences teach?

The first half of RLHF (Christiano et al. 2017, Ouyang et al. 2022): a GPT reads prompt and response, and a
scalar head on the last token of the response is the reward r-hat. The loss is Bradley-Terry's,
-p log s(r_w - r_l) - (1-p) log s(r_l - r_w). That is DPO's loss with gaps of rewards in place of margins.
A constant for each prompt cancels in every gap, so errors are measured after centring on each prompt's mean.

  python -m lab.methods.reward_model                                  the true reward of bt is known
  python -m lab.methods.reward_model --data cyclic                    no reward is true here
  python -m lab.methods.reward_model --data deterministic --steps 500

Traps: the head must not read padding. In `cyclic` r-hat is compared with the fit to endless pairs. In
`deterministic` that fit is infinite: rewards grow as long as one trains, and few --steps hold them.
"""
import copy

import torch

import data
import ipo
from lab.common import exact, start


class RewardModel(torch.nn.Module):
    """A language model's trunk with a number on top."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        # no bias, since it would cancel in every gap
        self.value = torch.nn.Linear(trunk.config.n_embd, 1, bias=False)

    def forward(self, tokens, mask):  # (R,T), (R,T) -> (R,)
        """The reward of each row, read at its last response token."""
        # the largest position in the mask
        last = (mask * torch.arange(tokens.shape[1])).argmax(1)  # (R,)
        x = self.trunk.hidden(tokens)                    # (R,T,C)
        return self.value(x[torch.arange(len(x)), last]).squeeze(1)


def fit(policy, world, args, steps, lr):
    """A RewardModel on a copy of the policy's trunk, trained on the world's pairs."""
    reward = RewardModel(copy.deepcopy(policy))
    optimizer = ipo.adam(reward)
    order = data.shuffled(len(world.train), args.batch_size, steps, ipo.generator(args, 3))
    for step, index in enumerate(order, 1):
        batch = world.pairs.batch(world.train[index])
        winner, loser = reward(batch.tokens, batch.mask).chunk(2)
        gap = winner - loser  # (B,)
        loss = ipo.dpo_loss(gap, batch.p, 1.0).mean()
        loss.backward()
        ipo.optimizer_step(optimizer, step, steps, lr)
        if step % args.log_every == 0:
            ipo.told(f"reward model {step}/{steps}", ipo.means({"loss": loss, "gap": gap}))
    return reward


@torch.no_grad()
def table(reward, world):  # -> (X,Y)
    """r-hat of every response."""
    return reward(*world.pairs.padded(slice(None))).view_as(world.reward).double()


def taught(world):  # -> (X,Y)
    """What endless pairs teach; in deterministic, where that is infinite, the world's own reward."""
    return exact.rewards(world.pstar, world.mu) if world.args.data == "cyclic" else world.reward


def best_policy(ref_logp, reward, tau):  # (X,Y), (X,Y) -> (X,Y)
    """log of ref exp(r/tau) / Z, which maximises E[r] - tau KL(pi||ref)."""
    return (ref_logp + reward / tau).log_softmax(-1)


def rmse(reward, other):  # (X,Y), (X,Y) -> ()
    """Root of the mean squared difference, when a constant of each prompt is taken off."""
    error = reward - other
    return (error - error.mean(-1, keepdim=True)).square().mean().sqrt()


def run(argv):
    args = start.parse(start.parser(__doc__), argv, "--out out/reward_model --lr 3e-3", ["loss"], world=True)
    policy, world = start.start(args)
    learned, right = table(fit(policy, world, args, args.steps, args.lr), world), taught(world)
    ref = world.exact["ref"]
    ours, best = best_policy(ref, learned, args.tau), best_policy(ref, right, args.tau)
    figures = ipo.means({
        "error, root mean square": rmse(learned, right),
        "span of its rewards": learned.amax(-1) - learned.amin(-1),
        "KL between best policies": data.kl(ours, best),
    })
    error, span, far = figures.values()
    answer = (f"In {args.data} the learned reward is {error:.3f} off (root mean square) and spans {span:.1f} "
              f"from the worst response to the best. At tau {args.tau} the best policy for it is {far:.4f} "
              "nats from the best policy for the right one.")
    if args.data == "deterministic":
        answer = f"Certain preferences teach no finite reward. It grows with --steps, to {span:.1f} now."
    start.finish(args, answer, figures)


if __name__ == "__main__":
    raise SystemExit(start.main("reward_model", run))
