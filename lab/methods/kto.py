"""Do thumbs up and down, without pairs, teach what pairs teach? KTO (Ethayarajh et al. 2024).

A response of log-ratio f = log pi/ref costs 1 - s(tau (f - z0)) if it is liked, 1 - s(tau (z0 - f)) if not.
z0 stands for KL(pi||ref) and passes no gradient. A world's policy is enumerated, so there z0 is the KL. For a
file it is the paper's estimate: the mean f of the batch's responses after other prompts, at least 0. A
response that is liked with probability g costs, but for a constant, (1 - 2g) s(tau (f - z0)) on average. So a
minimiser gives no mass at all where g < 1/2.

  python -m lab.methods.kto                          in a world, against the exact answer
  python -m lab.methods.kto --data FILE.jsonl        lines {"prompt", "completion", "label": true or false}

Traps: a file's responses are not the policy's, so the estimate lies far below the KL, and is 0 mostly. A
liked row far below z0 has no slope, so too high an --lr drives both kinds down: look at both, not at their
difference. Among responses with g > 1/2 the loss is not convex. The exact answer here is the minimiser that
LBFGS finds from the reference, and KL(answer||pi) is its distance, since the answer has zeros.
"""
import json

import torch

import data
import ipo
from lab.common import exact, start

KINDS = {"prompt": str, "completion": str, "label": bool}  # a row's keys
NEEDED = 'write {"prompt": "...", "completion": "...", "label": true or false}'
UNREAD = {True: "\0", False: "\1"}  # by label: stands where a pair has its other response, and is not read


def cost(f, z0, label, args):  # (R,), (), (R,) in 0..1 -> (R,)
    gain = torch.sigmoid(args.tau * (f - z0))
    return label * (1 - gain) + (1 - label) * gain


# ------------------------------------------------------------------------------------------- rows with labels

def parse(item, notes):  # -> data.Pair
    """One line of a file, in TRL's unpaired form. A row's p is its label."""
    for key, kind in KINDS.items():
        if not isinstance(item.get(key), kind):
            found = json.dumps(item[key]) if key in item else f"not among {', '.join(item)}"
            raise data.Refused(f"{key!r} is {data.short(found)}; {NEEDED}")
    unused = ", ".join(sorted(item.keys() - KINDS.keys()))
    notes[f"lines with keys that are not used: {data.short(unused)!r}"] += unused != ""
    liked = item["label"]
    return data.Pair(item["prompt"], item["completion"], UNREAD[liked], float(liked))


class Thumbs(ipo.FileSource):
    """Rows of a file, each the first of a pair whose p is the probability that the row is liked."""

    def __init__(self, args):
        print("data: from here on a row counts as a pair")
        try:
            super().__init__(args, pairs=data.read_jsonl(args.data, parse))
        except data.Refused as error:
            raise data.Refused(str(error).replace(data.NEEDED, NEEDED)) from None
        self.sft_weight[self.pairs.chosen] *= self.pairs.p
        self.sft_weight[self.pairs.rejected] = 0
        for which in (self.train, self.held_out):
            p = self.pairs.p[which]
            if not 0 < p.mean() < 1:
                raise data.Refused(f"--data {args.data}: {p.sum():g} of {len(p)} rows for training, or "
                                   "held out, are liked; both kinds are needed in both (--holdout, --seed)")

    def labelled(self, which):  # -> rows (N,), labels (N,) in 0..1
        return self.pairs.chosen[which], self.pairs.p[which]

    def evaluate(self, policy):
        """Means of log pi/ref over the held-out rows that are liked, and over the others."""
        rows, label = self.labelled(self.held_out)
        f = ipo.score(policy, self.pairs, self.args, rows) - self.pairs.ref_logp[rows]
        return ipo.means({"liked": f[label == 1], "disliked": f[label == 0]})


class World(ipo.WorldSource):
    """A world whose pairs are taken apart: each response is a row, liked or not."""

    def labelled(self, which):  # -> rows (2N,), labels (2N,)
        p = self.pairs.p[which]
        return self.pairs.pair_rows(which), torch.cat([p, 1 - p])

    def set_reference(self, ref_logp):
        super().set_reference(ref_logp)
        # (X,Y) how often each response is liked
        self.g = data.mean_over_opponents(self.pstar, self.mu)
        self.answer = answer(self)

    def evaluate(self, policy):
        logp = self.table(policy)
        return ipo.means({
            "KL(answer||pi)": data.kl(self.answer, logp),
            "mass where g < 1/2": (logp.exp() * (self.g < 0.5)).sum(-1),
            "KL to ref": data.kl(logp, self.exact["ref"]),
            "win rate": exact.win(logp, self.pstar, self.mu),
        })


def answer(world):  # -> log pi (X,Y)
    """The minimiser at the z0 that it has itself, from the reference."""
    g, ref, args = world.g, world.exact["ref"], world.args
    logp, z0 = ref, 0

    def mean(logp):
        return (world.mu * cost(logp - ref, z0, g, args)).sum(-1).mean()

    for _ in range(20):  # z0 is the same to 1e-6 after that
        logp = exact.minimise(mean, logp, 500)
        z0 = data.kl(logp, ref)
    return logp


# ------------------------------------------------------------------------------------------------- training

def mismatched(pairs, block_size):
    """PairData of as many rows: each response, after the prompt that stands half of all rows further on."""
    rows = list(zip(pairs.tokens.tolist(), pairs.prompt_len, pairs.length))
    prompts, responses = [], []
    for row, (tokens, n, end) in enumerate(rows):
        other, m, _ = rows[row - len(rows) // 2]
        responses.append(tokens[n:end])
        prompts.append(other[:m][end - n - block_size:])
    return data.PairData(prompts, responses)


def anchor(policy, source, args):  # -> a function (policy, rows) -> z0, a number that passes no gradient
    """Made while the policy is the reference."""
    if args.data in data.WORLDS:
        table = exact.Table(source)
        ref = source.exact["ref"].float()
        return lambda policy, rows: data.kl(table(policy).detach(), ref)
    other = mismatched(source.pairs, policy.config.block_size)
    ref_logp = ipo.score(policy, other, args)

    def estimate(policy, rows):
        f = ipo.score(policy, other, args, rows) - ref_logp[rows]
        return f.mean().clamp(min=0)

    return estimate


def losses(policy, source, args):
    """Yields the mean cost of 2 x --batch_size rows for each step."""
    rows, label = source.labelled(source.train)
    z0 = anchor(policy, source, args)
    random = ipo.generator(args, 1)
    for index in data.shuffled(len(rows), 2 * args.batch_size, args.steps, random):
        part = rows[index]
        with ipo.precision(args):
            logp = ipo.sequence_logp(policy, *source.pairs.padded(part))
        f = logp - source.pairs.ref_logp[part]
        yield cost(f, z0(policy, part), label[index], args).mean()


def run(argv):
    args = start.parse(start.parser(__doc__), argv, "--tau 0.5 --out out/kto", without=["loss"])
    policy, source = start.start(args, World, Thumbs)
    args.loss = "kto"  # so the saved flags of the policy say what trained it
    start.fit(policy, losses(policy, source, args), args, source.evaluate)
    numbers = source.evaluate(policy)
    said = "Liked rows moved by {liked:+.2f} nats against the reference, the others by {disliked:+.2f}."
    if args.data in data.WORLDS:
        said = ("Thumbs alone left {mass where g < 1/2:.1%} of the policy on responses that lose more often "
                "than they win, where the exact answer has none. It is {KL(answer||pi):.3f} nats from there.")
    start.finish(args, said.format(**numbers), numbers)


if __name__ == "__main__":
    raise SystemExit(start.main("kto", run))
