"""Do thumbs up and down, without pairs, teach what pairs teach? KTO (Ethayarajh et al. 2024), and its z0.

A response of log-ratio f = log pi/ref costs 1 - s(tau (f - z0)) if liked, 1 - s(tau (z0 - f)) if not; z0
stands for KL(pi||ref) and passes no gradient. One that wins with probability g costs, but for a constant,
(1 - 2g) s(tau (f - z0)) on average: a minimiser gives no mass at all to responses with g < 1/2, and between
the others this is not convex: at tau .5 other starts end .002 to .44 nats off. The answer here is the one
from the reference; kl is KL(answer||pi), as it has zeros, and `bad` the mass that pi has where g < 1/2.
  --z0 policy      KL(pi||ref) by enumeration: what the formula means (worlds only)
  --z0 mismatched  the paper's estimate: mean f of the batch's responses after other prompts, at least 0
  --z0 data        mean f of the batch's own responses, at least 0
  --z0 zero        0: the loss of APO-zero (D'Oosterlinck et al. 2024)
Traps: data are not the policy's responses: both means are -5 where KL is 1.3, so z0 is 0 throughout.
A liked row far below z0 has no slope: too high an --lr drives both kinds down. A pair counts as two rows.
--data FILE takes pairs, or lines {"prompt", "response", "label": true or false}.
Answer: bt, tau .5, seeds 0 1 2: kl .059 .046 .061, bad mass .003, win rate .73 (DPO .77 at the same tau).
"""
import sys
import time

import torch

import data
import ipo
from lab.common import start as begin
from lab.common import exact
from lab.methods import thumbs


def loss(f, z0, label, args):  # (R,), (), (R,) in 0..1 -> (R,)
    gain = torch.sigmoid(args.tau * (f - z0))
    return label * args.liked * (1 - gain) + (1 - label) * args.disliked * gain


def mismatched(pairs, block_size):
    """PairData of as many rows: each response, after the prompt that stands half of all rows further on."""
    n, rows = len(pairs.prompt_len), []
    for row in range(n):
        first = pairs.start[row] + pairs.prompt_len[row]
        response = pairs.tokens[first:pairs.start[row + 1]].tolist()
        prompt = pairs.prompt_ids((row + n // 2) % n)
        room = block_size - len(response)
        rows.append((prompt[-room:], response))
    return data.PairData(rows)


def ratio(policy, pairs, ref_logp, rows, args):  # -> (R,) log pi/ref
    with ipo.autocast(args):
        logp = ipo.sequence_logp(policy, *pairs.padded(rows, args.device))
    return logp - ref_logp[rows].to(logp)


class Anchor:
    """anchor(policy, rows, f of these rows) -> z0 (), a number; made while the policy is the reference."""

    def __init__(self, policy, source, args):
        self.source, self.args = source, args
        if args.z0 == "policy":
            self.table = exact.Table(source)
        if args.z0 == "mismatched":
            self.other = mismatched(source.pairs, policy.config.block_size)
            self.ref_logp = ipo.score(policy, self.other, torch.arange(len(self.other.prompt_len)), args)

    @torch.no_grad()
    def __call__(self, policy, rows, f):
        z0 = torch.zeros(())
        if self.args.z0 == "policy":
            z0 = data.kl(self.table(policy).double(), self.source.ref).float()
        if self.args.z0 == "mismatched":
            z0 = ratio(policy, self.other, self.ref_logp, rows, self.args).mean()
        if self.args.z0 == "data":
            z0 = f.mean()
        return z0.clamp(min=0)


def train(policy, source, ref_logp, args, evaluate, generator):
    """As ipo.train, on rows in random order: 2 x --batch_size a step."""
    rows, label = thumbs.examples(source, source.train)
    optimizer, anchor, lines = ipo.adamw(policy), Anchor(policy, source, args), []
    for step, index in enumerate(data.batches(len(rows), 2 * args.batch_size, args.steps, generator), 1):
        f = ratio(policy, source.pairs, ref_logp, rows[index], args)
        z0 = anchor(policy, rows[index], f)
        cost = loss(f, z0, label[index].to(f), args).mean()
        cost.backward()
        ipo.descend(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            batch = {"loss": cost.item(), "z0": z0.item(), "mean f": f.mean().item()}
            begin.keep(policy, lines, step, batch, evaluate(policy), args)


def wins(world, args):  # -> (X,Y), (X,Y)
    """How often each response occurs, and how often it is then liked, g."""
    weights = exact.weights(world.mu)
    p = world.pstar + args.noise * (1 - 2 * world.pstar)
    seen = weights.sum(-1)
    return seen, (weights * p).sum(-1) / seen


def answer(world, args, start):  # (X,Y) -> log pi (X,Y)
    """The minimiser at the z0 that it has itself, from the log-probs `start`."""
    seen, g = wins(world, args)

    def cost(logp):
        return (seen * loss(logp - world.ref, z0, g, args)).sum(-1).mean()

    logp, z0 = start, torch.zeros(())
    for _ in range(100):
        logp, last = exact.minimise(cost, logp, 500), z0
        if args.z0 == "policy":
            z0 = data.kl(logp, world.ref)
        if (z0 - last).abs() <= 1e-6:
            break
    return logp


def exactly(world, args):
    """policy -> numbers by name, given the answer from the reference; how far that from other starts is."""
    _, g = wins(world, args)
    noise = torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(args.seed))
    starts = [world.ref, torch.zeros_like(g), world.ref + 2 * noise]
    best, *others = (answer(world, args, start) for start in starts)
    print("KL of the answers from other starts:", [f"{data.kl(best, other):.3f}" for other in others])
    against = exact.against(world.pstar, world.mu)

    def numbers(policy):
        logp = policy if isinstance(policy, torch.Tensor) else world.enumerate(policy)
        return data.finite({
            "kl": data.kl(best, logp), "kl_ref": data.kl(logp, world.ref),
            "win": (logp.exp() * against).sum(-1).mean(), "bad": (logp.exp() * (g < 0.5)).sum(-1).mean()})

    print("answer:", begin.told(numbers(best)))
    return numbers


def held_out(source, ref_logp, args):
    """policy -> numbers by name: mean log-ratios of the held-out rows that were liked, and of the others."""
    rows, label = thumbs.examples(source, source.eval)

    def numbers(policy):
        f = ipo.score(policy, source.pairs, rows, args) - ref_logp[rows]
        liked, disliked = (f * label).sum() / label.sum(), (f * (1 - label)).sum() / (1 - label).sum()
        return data.finite({"kl": torch.tensor(torch.nan), "liked": liked, "disliked": disliked})

    return numbers


def run(argv):
    parser = begin.flags(__doc__)
    parser.add_argument("--z0", choices=["policy", "mismatched", "data", "zero"],
                        help="see above [world: policy, file: mismatched]")
    parser.add_argument("--liked", type=float, default=1.0, help="weight of liked rows, lambda_D [1]")
    parser.add_argument("--disliked", type=float, default=1.0, help="weight of the others, lambda_U [1]")
    args = begin.parse(parser, argv, "--tau 0.5 --z0 policy --out out/kto", "--z0 mismatched --out out/kto")
    world = args.data in data.WORLDS
    if args.z0 == "policy" and not world:
        raise data.Refused("--z0 policy: only a world's policy can be enumerated; use --z0 mismatched")
    policy, source, ref_logp, generator = begin.start(args, thumbs.make)
    evaluate = exactly(source, args) if world else held_out(source, ref_logp, args)
    begun = time.process_time()
    train(policy, source, ref_logp, args, evaluate, generator)
    figures = {"name": f"KTO, z0 {args.z0}"} | evaluate(policy)
    return args, figures | {"seconds": time.process_time() - begun}


if __name__ == "__main__":
    sys.exit(begin.report("kto", run, sys.argv[1:]))
