"""What reward do preferences teach? The first half of RLHF: a language model's trunk with a number on top.

A GPT reads prompt and response; a scalar head on the last real token is r-hat. Bradley-Terry's likelihood,
-p log s(r_w - r_l) - (1-p) log s(r_l - r_w), is DPO's loss with gaps of rewards for margins. A constant per
prompt stays free, so errors are measured after centring on each prompt's mean.
Traps: the head must not read padding. In `cyclic` no reward is true: r-hat is compared with endless pairs'
fit. In `deterministic` that fit is infinite: the gap between best and worst response grows as long as one
trains; few steps, or --ridge times (r_w - r_l)^2, hold it.
  python -m lab.methods.reward                       [--labels soft] [--pairs 20000] [--data cyclic]
  python -m lab.methods.reward --data deterministic  [--reward_steps 500] [--ridge 0.01] [--tau 1]
  python -m lab.methods.reward --data FILE --init_from gpt2
Answer: RMSE of r-hat, seeds 0 to 2: bt .060 .072 .083 from 500,000 hard pairs, .004 .010 .005 from soft ones,
.154 .128 .158 from 20,000 hard ones; cyclic, from endless pairs' fit, .071 .076 .074.
"""
import copy
import sys

import torch
import torch.nn as nn

import data
import ipo
import model
from lab.common import start as begin
from lab.common import exact
from lab.common.start import start


class RewardModel(nn.Module):
    """reward(tokens, mask): (R,T), (R,T) -> (R,), read at each row's last response token."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.value = nn.Linear(trunk.config.n_embd, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens, mask):
        t = torch.arange(tokens.shape[1], device=tokens.device)
        wanted = t == (mask * t).amax(1, keepdim=True)  # (R,T)
        x = self.trunk.hidden(tokens, wanted)[wanted]   # (R,C)
        return self.value(x)[:, 0].float()


def cost(gap, p, ridge):  # (...), (...) -> (...)
    """Of a pair whose first response has a reward greater by gap and is preferred with probability p."""
    return ipo.dpo_loss(gap, p, 1.0) + ridge * gap ** 2


def fit(policy, source, args, generator):
    """A RewardModel on a copy of the policy's trunk, trained on the source's pairs."""
    reward, steps = RewardModel(copy.deepcopy(policy)), args.reward_steps
    reward.to(args.device)
    optimizer = ipo.adamw(reward)
    order = data.batches(len(source.train), args.batch_size, steps, generator)
    for step, index in enumerate(order, 1):
        batch = source.pairs.batch(source.train[index], args.device)
        with ipo.autocast(args):
            winner, loser = reward(batch.tokens, batch.mask).chunk(2)
        gap = winner - loser  # (B,)
        loss = cost(gap, batch.p, args.ridge).mean()
        loss.backward()
        ipo.descend(reward, optimizer, step, steps, args.reward_lr)
        if step % args.log_every == 0 or step == steps:
            print(f"reward {step:5d}/{steps} | loss {loss:.4f} | gap {gap.mean():+.2f}", flush=True)
    return reward.eval()


@torch.no_grad()
def score(reward, pairs, rows, args):  # (R,) -> (R,), on the CPU
    """r-hat of these rows of a PairData."""
    parts = rows.split(8 * args.batch_size)
    return torch.cat([reward(*pairs.padded(part, args.device)).cpu() for part in parts])


def rewards(reward, world, args):  # -> (X,Y)
    """r-hat of every response of a world."""
    rows = torch.arange(world.mu.numel())
    return score(reward, world.pairs, rows, args).view_as(world.mu).double()


def truth(world):  # -> (X,Y)
    """The reward behind the preferences; in `cyclic`, which has none, the fit to endless pairs."""
    if world.args.data == "cyclic":
        return exact.rewards(world.pstar, world.mu)
    return world.reward


def taught(world, args):  # -> (X,Y), NaN where no finite reward is likeliest
    """What endless pairs teach with this noise and ridge: the exact answer of this loss."""
    if not args.ridge and not args.noise:
        return truth(world) * (torch.nan if args.data == "deterministic" else 1.0)
    p = world.pstar + args.noise * (1 - 2 * world.pstar)

    def loss(logp):  # minimise hands log-probs over: rewards up to a constant
        gap = exact.margins(logp, torch.zeros_like(logp))
        return exact.expected(cost(gap, 1.0, args.ridge), p, world.mu)

    return exact.minimise(loss, torch.zeros_like(world.mu))


def best_policy(ref_logp, reward, tau):  # (X,Y), (X,Y) -> (X,Y)
    """log of ref exp(r/tau) / Z: what maximises E r - tau KL(pi||ref)."""
    return (ref_logp + reward / tau).log_softmax(-1)


def numbers(reward, source, args):
    """What can be said of a reward model: on a file of its held-out pairs, in a world of all responses."""
    if args.data not in data.WORLDS:
        learned = score(reward, source.pairs, source.rows, args)
        measured = ipo.measure(learned, torch.zeros(()), source.pairs.p[source.eval], args)
        return {"gap": measured["h"], "accuracy": measured["accuracy"]}
    learned, known = rewards(reward, source, args), taught(source, args)
    policy, best = (best_policy(source.ref, r, args.tau) for r in (learned, known))
    error = learned - known
    wins = exact.against(source.pstar, source.mu)
    return data.finite({
        "rmse": (error - error.mean(-1, keepdim=True)).square().mean().sqrt(),
        "gap": (learned.amax(-1) - learned.amin(-1)).mean(),  # the best's less the worst's
        "kl": data.kl(policy, best),
        "kl_ref": data.kl(policy, source.ref),
        "win": (policy.exp() * wins).sum(-1).mean(),
    })


def flags(doc):
    """A parser of a program's own flags, those of `fit` among them; ipo.parse knows the others."""
    parser = begin.flags(doc)
    parser.add_argument("--reward_steps", type=int, default=2000, help="of the reward model [2000]")
    parser.add_argument("--reward_lr", type=float, default=1.5e-3, help="its peak learning rate [0.0015]")
    parser.add_argument("--ridge", type=float, default=0.0, help="times (r_w - r_l)^2 in its loss [0]")
    return parser


def save(path, reward):
    model.save(path, reward.trunk, value=reward.value.state_dict())


def load(path):
    """The RewardModel that `save` wrote. Raises model.Refused."""
    trunk, extra = model.load(path)
    reward = RewardModel(trunk)
    if "value" not in extra:
        raise model.Refused(f"{path}: no reward model; name the reward.pt that a run left")
    reward.value.load_state_dict(extra["value"])
    return reward.eval()


def run(argv):
    suited = "--out out/reward --reward_lr "
    args = begin.parse(flags(__doc__), argv, suited + "3e-3", suited + "1e-4 --reward_steps 200")
    policy, source, _, generator = start(args)
    learned = fit(policy, source, args, generator)
    save(f"{args.out}/reward.pt", learned)
    return args, numbers(learned, source, args)


if __name__ == "__main__":
    sys.exit(begin.report("reward", run, sys.argv[1:]))
