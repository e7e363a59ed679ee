"""Does a policy that plays against its own past end at the distribution of its data?

SPIN (Chen et al. 2024): in a round the chosen response comes from the data, the rejected one from the policy
at the end of the round before, pi_t, which is the reference, too; the loss is DPO's with beta = lambda. A
pair (a, b) is seen with a chosen in proportion to p_data(a) pi_t(b), so lambda h rests at the log of the
odds:

  pi_{t+1}  =  pi_t^(1 - 1/lambda) p_data^(1/lambda) / Z

log pi_t - log p_data is multiplied by 1 - 1/lambda in a round: rounds converge iff lambda > 1/2, and lambda
= 1 needs one. Here p_data is a world's optimum at --tau; maximum likelihood on the same data, for as many
steps, stands beside it.

Traps: chosen and rejected are independent draws; with lambda .1 a round's answer lies 9 times as far from
p_data, in log space, on the other side.
`python -m lab.methods.selfplay --tau 1 [--lam 0.1]`
Answer: with lambda 1 yes: .0013, .0022, .0015 nats from it (seeds 0 to 2); with lambda .1 it is
carried away: 10.7 after four rounds (seed 0), where it began at .016.
"""
import copy
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch

import data
import ipo
import model
from lab.common import start


def flags(argv):
    """ipo.py's flags and these. Raises Refused."""
    parser = start.flags(__doc__)
    parser.add_argument("--lam", type=float, default=1.0, help="the paper's lambda, DPO's beta [1.0]")
    parser.add_argument("--rounds", type=int, default=4, help="how often the opponent is renewed [4]")
    parser.add_argument("--round_steps", type=int, default=250, help="a round's, in place of --steps [250]")
    own, rest = parser.parse_known_args(argv)
    args = ipo.parse(rest)
    vars(args).update(vars(own))
    if args.data not in data.WORLDS or args.resume or args.logp == "mean" or args.loss != "ipo":
        raise ipo.Refused("--data must name a world; --resume, --logp mean and --loss have no place here")
    if args.lam <= 0 or args.rounds < 1 or args.round_steps < 1:
        raise ipo.Refused("--lam, --rounds and --round_steps must be above 0")
    args.device = "cpu"  # tables of a world are small
    return args


def drawn(logp, n, generator):  # (X,Y) -> (n,) rows of the world, X divides n
    """Independent draws, as many of each prompt, prompt by prompt."""
    X, Y = logp.shape
    y = torch.multinomial(logp.exp(), n // X, replacement=True, generator=generator)
    return (torch.arange(X)[:, None] * Y + y).flatten()


def batches(world, p_data, opponent, args, generator):
    """Yields (Batch, its reference log-probs): chosen from the data, rejected from the opponent."""
    n = args.batch_size // len(p_data) * len(p_data)
    while True:
        rows = torch.cat([drawn(p_data, n, generator), drawn(opponent, n, generator)])
        yield data.Batch(*world.pairs.padded(rows), torch.ones(n)), opponent.flatten()[rows].float()


def answer(opponent, p_data, lam):  # (X,Y), (X,Y) -> (X,Y)
    """log pi where the round against this opponent rests."""
    return ((1 - 1 / lam) * opponent + p_data / lam).log_softmax(-1)


def play(policy, world, p_data, args, generator):
    """All rounds; their numbers: KL to the round's own answer, and from the data, in theory and reached."""
    rounds, theory = [], world.enumerate(policy)
    for k in range(1, args.rounds + 1):
        opponent = world.enumerate(policy)
        step = copy.copy(args)
        step.loss, step.tau = "dpo", args.lam
        step.steps, step.out = args.round_steps, f"{args.out}/round{k}"
        os.makedirs(step.out, exist_ok=True)
        ipo.train(policy, batches(world, p_data, opponent, step, generator), step, world.evaluate)
        reached, theory = world.enumerate(policy), answer(theory, p_data, args.lam)
        rounds.append(data.finite({
            "kl_round": data.kl(reached, answer(opponent, p_data, args.lam)),
            "kl_data": data.kl(p_data, reached),
            "kl_data_exact": data.kl(p_data, theory),
        }))
        said = [f"{name} {ipo.show(value)}" for name, value in rounds[-1].items()]
        print(f"round {k}:", ", ".join(said))
    return rounds


def run(args):
    """SFT, the rounds, and as much maximum likelihood from the same start."""
    begin = time.process_time()
    policy, world, _, generator = start.start(args)
    p_data = world.exact["opt"]
    world.exact = {"data": p_data}
    report = {"data": world.numbers(p_data), "before": world.evaluate(policy)}
    likely = copy.deepcopy(policy)
    rounds = play(policy, world, p_data, args, generator)
    seconds = time.process_time() - begin
    report["spin"] = world.evaluate(policy)
    world.sft_rows = functools.partial(drawn, p_data)
    args.sft_steps = args.rounds * args.round_steps
    ipo.finetune(likely, world, args, generator)
    report["likelihood"] = world.evaluate(likely)
    ipo.print_report(report)
    sft = data.kl(p_data, world.enumerate(likely)).item()
    print(f"KL(p_data||pi): {ipo.show(rounds[-1]['kl_data'])}; maximum likelihood: {sft:.4f}")
    report["after"] = report["spin"]
    found = {"name": f"SPIN, lambda {args.lam:g}", "kl": report["spin"]["kl_data"], "kl_likelihood": sft}
    found |= report["spin"] | {"seconds": seconds, "rounds": rounds} | report
    Path(f"{args.out}/report.json").write_text(json.dumps(found, indent=1))


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(flags(argv))
        return 0
    except (ipo.Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print("selfplay:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (ipo.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
