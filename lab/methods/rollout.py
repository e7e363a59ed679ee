"""What does a policy say to the prompts of a file, and what does a reward model think of it?

Responses are sampled token by token, all rows at once. Each row's next token is read at its own last token:
prompts of any length stand side by side, padded on the right, and samples of a prompt share its computation.
Traps: a row that ended must not go on; <|endoftext|> is part of the response, and so of its log-prob. The
reward model never saw a response that met --longest; without --no_end a policy soon learns never to end.
Samples drawn with the seed of training are no fair ones: KL was estimated at -3.5 nats from them.
  python -m lab.methods.rlhf --data FILE --init_from gpt2     leaves OUT/ckpt.pt, OUT/ref.pt and OUT/reward.pt
  python -m lab.methods.rollout --data FILE --run OUT         prints --k responses to held-out prompts, best first
Answer: 1,100 pairs of polite answers, bytes, 60 steps of RLOO (116 s): the mean reward of samples for
held-out prompts rises from -1.68 to -.66, all by learning to end: .69 of them ended before, .90 after.
"""
import os
import sys
from typing import Any, NamedTuple

import torch

import data
import ipo
import model
from lab.methods import reward
from lab.common import start as begin


class Drawn(NamedTuple):
    """k responses to each of P prompts."""
    where: Any              # by which `logp` finds them again
    ref_logp: torch.Tensor  # (P,k)
    reward: torch.Tensor    # (P,k)


def pick(probs, n, generator):  # (R,V) -> (R,n)
    if not probs.isfinite().all():
        raise ipo.Stopped("the policy is not finite; lower --lr or raise --tau")
    return torch.multinomial(probs, n, replacement=True, generator=generator)


@torch.no_grad()
def sample(policy, prompts, eot, longest, generator):  # R lists of ids -> (R,T), (R,T)
    """Tokens and response mask: all rows at once, up to <|endoftext|>, `longest` tokens or a full context."""
    device = next(policy.parameters()).device
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (R,)
    end = (length + longest).clamp(max=policy.config.block_size)
    tokens = torch.zeros(len(prompts), int(end.max()), dtype=torch.int64, device=device)
    t = torch.arange(tokens.shape[1], device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    begin = length.clone()
    going = (length < end).nonzero().flatten()
    while len(going):
        width = int(length[going].max())
        wanted = t[:width] == length[going, None] - 1  # the last token of each row
        x = policy.hidden(tokens[going, :width], wanted)[wanted]
        new = pick(policy.head(x).softmax(-1, dtype=torch.float32), 1, generator)[:, 0]
        tokens[going, length[going]] = new
        length[going] += 1
        going = going[(new != eot) & (length[going] < end[going])]
    mask = (t >= begin[:, None]) & (t < length[:, None])
    width = int(length.max())
    return tokens[:, :width], mask[:, :width]


class Sampled:
    """Prompts of a FileSource, by the rows that begin with them; responses judged by a reward model."""

    def __init__(self, source, reference, judge, args):
        self.source, self.reference, self.judge, self.args = source, reference, judge, args
        self.rows = source.pairs.chosen[source.train]

    def draw(self, policy, generator, rows=None):  # -> Drawn
        if rows is None:
            rows = self.rows[torch.randperm(len(self.rows))[:self.args.prompts]]
        prompts = [self.source.pairs.prompt_ids(row) for row in rows.repeat_interleave(self.args.k)]
        eot = self.source.tokenizer.eot_token
        where = sample(policy, prompts, eot, self.args.longest, generator)
        with torch.no_grad():
            judged = self.judge(*where)
            judged = judged - self.args.no_end * ~self.ended(*where)
            return Drawn(where, self.logp(self.reference, where), judged.view(-1, self.args.k))

    def ended(self, tokens, mask):  # (R,T), (R,T) -> (R,) whether <|endoftext|> came
        return ((tokens == self.source.tokenizer.eot_token) & mask).any(1)

    def logp(self, policy, where):  # -> (P,k), differentiable
        with ipo.autocast(self.args):
            return ipo.sequence_logp(policy, *where).view(-1, self.args.k)

    def luck(self):
        """The same for every policy, and not the luck of training: what that drew was pushed up or down."""
        return torch.Generator(self.args.device).manual_seed(self.args.seed + 1_000_000)

    @torch.no_grad()
    def numbers(self, policy):
        """Estimates on held-out prompts. ended: the share that did; win: against the reference's samples, by
        the reward model."""
        rows = self.source.pairs.chosen[self.source.eval][:4 * self.args.prompts]
        theirs = self.draw(self.reference, self.luck(), rows)
        mine = self.draw(policy, self.luck(), rows)
        kl = self.logp(policy, mine.where) - mine.ref_logp
        win = (mine.reward - theirs.reward).sigmoid()
        ended = self.ended(*mine.where).float()
        means = {"reward": mine.reward, "ended": ended, "kl_ref": kl, "win": win}
        return data.finite({name: value.mean() for name, value in means.items()})

    def show(self, policy, rows):
        """The samples of each of these prompts, best first."""
        drawn = self.draw(policy, self.luck(), rows)
        tokens, mask = drawn.where
        decode = self.source.tokenizer.decode
        for number, row in enumerate(rows):
            print(f"\n{decode(self.source.pairs.prompt_ids(row))[-99:]!r}")
            for i in drawn.reward[number].argsort(descending=True).tolist():
                sampled = number * self.args.k + i
                text = decode(tokens[sampled][mask[sampled]].tolist())
                print(f"  {drawn.reward[number, i]:+7.3f} {text!r}")


def flags(doc):
    parser = reward.flags(doc)
    parser.add_argument("--k", type=int, default=64, help="samples of a prompt [world: 64, file: 8]")
    parser.add_argument("--prompts", type=int, default=4, help="file: prompts at once [4]")
    parser.add_argument("--longest", type=int, default=64, help="file: tokens of a response at most [64]")
    parser.add_argument("--no_end", type=float, default=5.0, help="file: taken off the reward then [5]")
    return parser


def run(argv):
    parser = flags(__doc__)
    parser.add_argument("--run", default="out/rlhf", help="folder that lab.methods.rlhf left [out/rlhf]")
    args = begin.parse(parser, argv, "", "--k 8 --out out/rollout")
    if args.data in data.WORLDS:
        raise data.Refused(f"--data {args.data}: a world is enumerated, not sampled; name a JSONL file")
    if min(args.k, args.prompts, args.longest) < 1:
        raise data.Refused("--k, --prompts and --longest must be at least 1")
    if os.path.exists(f"{args.out}/ref.pt"):
        raise data.Refused(f"--out {args.out} holds a run, whose report would be lost; name another --out")
    policy, saved = model.load(f"{args.run}/ckpt.pt")
    reference, _ = model.load(f"{args.run}/ref.pt")
    judge = reward.load(f"{args.run}/reward.pt")
    args.tokenizer, args.block_size = saved.get("tokenizer", args.tokenizer), policy.config.block_size
    source = ipo.FileSource(args)
    if policy.config.vocab_size < source.sizes[1]:
        raise data.Refused(f"--run {args.run}: its model knows other words than {args.data}")
    task = Sampled(source, reference.to(args.device), judge.to(args.device), args)
    task.show(policy.to(args.device), source.pairs.chosen[source.eval][:args.prompts])
    return args, task.numbers(policy)


if __name__ == "__main__":
    sys.exit(begin.report("rollout", run, sys.argv[1:]))
