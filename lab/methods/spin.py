"""Does a policy that plays against its own past (SPIN) end at the distribution of its data?

SPIN (Chen et al. 2024): in a round the chosen response comes from the data, the rejected one from the
policy at the end of the round before, pi_t. That is the reference, too, and the loss is DPO's with beta =
lambda. A pair (a, b) is seen with a chosen in proportion to p_data(a) pi_t(b), so lambda h rests at the log
of the odds:

  pi_{t+1}  =  pi_t^(1 - 1/lambda) p_data^(1/lambda) / Z

A round multiplies log pi_t - log p_data by 1 - 1/lambda. So rounds converge if and only if lambda is above
1/2, and lambda = 1 needs one round. Here p_data is the world's optimum at --tau.

  python -m lab.methods.spin
  python -m lab.methods.spin --lam 0.1 --tau 1       is carried away

A step takes equally many pairs of each of the four prompts. So --batch_size is rounded down to a multiple of
four, and is 4 at least.
Trap: with lambda .1 a round's answer lies 9 times as far from p_data, in log space, on the other side.
"""
from pathlib import Path

import torch

import data
import ipo
from lab.common import start


def draw(logp, n, random):  # (X,Y) -> (X n,)
    """Rows of the world: n responses to each prompt."""
    X, Y = logp.shape
    # True: with replacement
    y = torch.multinomial(logp.exp(), n, True, generator=random)
    first = Y * torch.arange(X)[:, None]  # each prompt's first row
    return (first + y).flatten()


def batches(world, p_data, opponent, args, random):  # p_data, opponent (X,Y): log-probs
    """Yields the Batch of each step: chosen responses from the data, rejected ones from the opponent."""
    n = max(1, args.batch_size // len(p_data))
    p = torch.ones(n * len(p_data))
    for _ in range(args.steps):
        rows = torch.cat([draw(p_data, n, random), draw(opponent, n, random)])
        yield data.Batch(*world.pairs.padded(rows), p, opponent.flatten()[rows].float())


def answer(opponent, p_data, lam):  # (X,Y), (X,Y) -> (X,Y)
    """log pi where the round against this opponent rests."""
    return ((1 - 1 / lam) * opponent + p_data / lam).log_softmax(-1)


def play(policy, world, p_data, args):
    """All rounds. Returns KL(p_data||pi) after each, and what it would be if each ended at its answer."""
    opponent = theory = world.exact["ref"]
    random = ipo.generator(args, 5)
    figures = {}
    mine = start.changed(args, loss="dpo", tau=args.lam)

    def distance(policy):
        return ipo.means({"kl_data": data.kl(p_data, world.table(policy))})

    for number in range(1, args.rounds + 1):
        print(f"round {number}:")
        theory = answer(theory, p_data, args.lam)
        Path(args.out, "ckpt.pt").unlink(missing_ok=True)  # or ipo.train would go on from there
        ipo.train(policy, batches(world, p_data, opponent, mine, random), mine, distance)
        opponent = world.table(policy)
        figures[f"after round {number}"] = data.kl(p_data, opponent)
        figures[f"  exact round {number}"] = data.kl(p_data, theory)
    return figures | {"KL(answer||pi)": data.kl(theory, opponent)}


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--lam", type=float, default=1.0, help="the paper's lambda, DPO's beta [1.0]")
    own.add_argument("--rounds", type=int, default=4, help="of --steps steps each [4]")
    args = start.parse(own, argv, "--steps 250 --out out/spin", ["loss", "labels", "pairs"], world=True)
    if args.lam <= 0 or args.rounds < 1:
        raise data.Refused("--lam takes more than 0, --rounds 1 or more")
    policy, world = start.start(args)
    p_data = world.exact["opt"]
    figures = play(policy, world, p_data, args)
    after = figures[f"after round {args.rounds}"]
    text = (f"With lambda {args.lam} SPIN is {after:.4f} nats from its data, KL(p_data||pi). It began at "
            f"{data.kl(p_data, world.exact['ref']):.4f}.")
    start.finish(args, text, ipo.means(figures))


if __name__ == "__main__":
    raise SystemExit(start.main("spin", run))
