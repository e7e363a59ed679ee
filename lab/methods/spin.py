"""Does a policy that plays against its own past (SPIN) end at the distribution of its data?

SPIN (Chen et al. 2024): in a round the chosen response comes from the data, the rejected one from the policy
at the end of the round before, pi_t, which is the reference, too. The loss is DPO's with beta = lambda. A pair
(a, b) is seen with a chosen in proportion to p_data(a) pi_t(b), so lambda h rests at the log of the odds, and

  pi_{t+1}  =  pi_t^(1 - 1/lambda) p_data^(1/lambda) / Z

A round multiplies log pi_t - log p_data by 1 - 1/lambda. So rounds converge if and only if lambda is above 1/2,
and lambda = 1 needs one round. Here p_data is the world's optimum at --tau. Maximum likelihood on the same
data, for as many steps, stands beside it.

  python -m lab.methods.spin
  python -m lab.methods.spin --lam 0.1 --tau 1       is carried away

Trap: with lambda .1 a round's answer lies 9 times as far from p_data, in log space, on the other side.
"""
import copy
import sys
from pathlib import Path

import torch

import data
import ipo
from lab.common import start
from lab.methods import reward_model


def batches(world, p_data, opponent, args, random):  # p_data, opponent (X,Y): log-probs
    """Yields the Batch of each step: chosen responses from the data, rejected ones from the opponent."""
    X, Y = p_data.shape
    each = max(1, args.batch_size // X)           # pairs of each prompt
    row = torch.arange(X)[:, None] * Y            # of each prompt's first response
    for _ in range(args.steps):
        chosen, rejected = (torch.multinomial(logp.exp(), each, replacement=True, generator=random)
                            for logp in (p_data, opponent))  # (X,each)
        rows = torch.cat([(row + chosen).flatten(), (row + rejected).flatten()])
        tokens, mask = world.pairs.padded(rows)
        yield data.Batch(tokens, mask, torch.ones(X * each), opponent.flatten()[rows].float())


def answer(opponent, p_data, lam):  # (X,Y), (X,Y) -> (X,Y)
    """log pi where the round against this opponent rests."""
    return ((1 - 1 / lam) * opponent + p_data / lam).log_softmax(-1)


def play(policy, world, p_data, args):
    """All rounds. Returns KL(p_data||pi) before them and after each, [reached], [of exact rounds]."""
    theory = world.table(policy)
    reached, exactly = [data.kl(p_data, theory).item()], []
    random = ipo.generator(args, 5)
    mine = copy.copy(args)
    mine.loss, mine.tau = "dpo", args.lam

    def evaluate(policy):
        return ipo.means({"kl_data": data.kl(p_data, world.table(policy))})

    for number in range(1, args.rounds + 1):
        print(f"round {number}:")
        opponent, theory = world.table(policy), answer(theory, p_data, args.lam)
        Path(args.out, "ckpt.pt").unlink(missing_ok=True)  # or ipo.train would go on from there
        ipo.train(policy, batches(world, p_data, opponent, mine, random), mine, evaluate)
        reached.append(data.kl(p_data, world.table(policy)).item())
        exactly.append(data.kl(p_data, theory).item())
    return reached, exactly


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--lam", type=float, default=1.0, help="the paper's lambda, DPO's beta [1.0]")
    own.add_argument("--rounds", type=int, default=4, help="how often the opponent is renewed; --steps each [4]")
    args = reward_model.parse(own, argv, "--steps 250 --out out/spin", ("labels", "pairs"))
    if args.lam <= 0 or args.rounds < 1:
        raise data.Refused("--lam takes more than 0, --rounds 1 or more")
    policy, world = start.start(args)
    p_data, likely = world.exact["opt"], copy.deepcopy(policy)
    reached, exactly = play(policy, world, p_data, args)
    print("maximum likelihood:")
    world.sft_weight = p_data.exp().flatten()
    mine = copy.copy(args)
    mine.sft_steps = args.rounds * args.steps
    ipo.finetune(likely, world, mine)
    best = data.kl(p_data, world.table(likely)).item()
    verdict = "arrives at" if reached[-1] < 0.02 else "comes nearer to" if reached[-1] < reached[0] else "leaves"
    figures = {"before": reached[0]}
    for number, pair in enumerate(zip(reached[1:], exactly), 1):
        figures[f"after round {number}"], figures[f"  exact round {number}"] = pair
    figures["maximum likelihood"] = best
    figures["kl_ref"] = data.kl(world.table(policy), world.exact["ref"]).item()
    start.finish(args, f"With lambda {args.lam} SPIN {verdict} its data: KL(p_data||pi) is {reached[-1]:.4f} nats "
                 f"after {args.rounds} rounds, {reached[0]:.4f} before them, and {best:.4f} after maximum "
                 f"likelihood on the same data.", figures)


if __name__ == "__main__":
    sys.exit(start.main("spin", run))
