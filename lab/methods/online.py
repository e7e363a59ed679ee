"""Where does IPO end when its pairs come from the policy itself, and is that better than offline?

IPO fits log pi(y)/ref(y) to the mean of its targets over opponents y' ~ mu, whatever mu is (Azar et al. 2023,
eq. 7). Draw both responses of a pair from the policy as it is now, and mu moves along. The policy then rests
where it is its own answer.

  --pairs_from policy     online IPO: mu = pi; it ends at the Nash policy of the regularised game (Munos et
                          al. 2023, Calandriello et al. 2024)
  --pairs_from mixture    IPO-MD (Calandriello et al. 2024): mu = pi^(1-b) ref^b / Z, over whole responses
  --pairs_from rejection  RSO (Liu et al. 2023): mu = ref exp(r) / Z, candidates of ref that a coin
                          accepts
  --labels_by reward      RLAIF: a reward model of the world's pairs judges, s(r-hat - r-hat') in place of p*;
                          it is trained for --steps, too
  --offline               trains offline, too (mu fixed, pairs that never run out), and compares both ends

  python -m lab.methods.online --offline --data deterministic        online and offline IPO, how far apart?
  python -m lab.methods.online --pairs_from mixture --tau 0.1 --labels soft
  python -m lab.methods.online --pairs_from rejection

Traps: the sampler has no gradient. A mixture of whole responses is not a mixture of tokens. Rejection needs
the largest reward of all responses, not that of its candidates, or it is biased. And what its pairs rarely
hold it does not teach. The exact answers to hard labels are right for the paper's Psi alone.
"""
import copy
from pathlib import Path

import torch

import data
import ipo
from lab.common import exact, start
from lab.methods.reward_model import fit, table

METHODS = {"policy": "Online IPO", "mixture": "IPO-MD", "rejection": "RSO", "offline": "Offline IPO"}


def opponents(logp, mu, ref, args):  # (X,Y) each -> (X,Y)
    """log of what both responses are drawn from while the policy is log pi; log mu if no policy moves it."""
    if args.pairs_from == "policy":
        return logp
    if args.pairs_from == "mixture":
        return ((1 - args.b) * logp + args.b * ref).log_softmax(-1)
    return mu


def batches(policy, ref, judge, mu, args):  # judge (X,Y,Y)
    """Yields the Batch of each step: fresh pairs, labelled by the judge."""
    world, random = data.World(args.data), ipo.generator(args, 5)
    world.pstar = judge
    world.pairs.ref_logp = ref.flatten().float()
    read = exact.Table(world)
    for _ in range(args.steps):
        with torch.no_grad():  # the sampler is no part of the loss
            logp = read(policy).double()
        law = opponents(logp, mu, ref, args)
        world.draw(args.batch_size, law.exp(), args.labels, random)
        yield world.pairs.batch(torch.arange(args.batch_size))


def accepted(ref, r, args):  # (X,Y), (X,Y) -> (X,Y)
    """log of the shares of the --pairs candidates a prompt from ref that are kept.

    Each is kept with probability exp(r - max r), so they are exact draws from ref exp(r) / Z.
    """
    random = ipo.generator(args, 6)
    # True: with replacement
    y = torch.multinomial(ref.exp(), args.pairs, True, generator=random)
    chance = (r - r.amax(-1, keepdim=True)).exp()
    kept = torch.rand(y.shape, generator=random) < chance.gather(1, y)
    print(f"rejection: {kept.double().mean():.2%} of {args.pairs:,} candidates a prompt are accepted")
    if not kept.any(1).all():
        raise data.Refused("no candidate was accepted; give more --pairs")
    counts = torch.zeros_like(ref).scatter_add(1, y, kept.double())
    return (counts / counts.sum(-1, keepdim=True)).log()


def answer(asked, mu, ref, args):  # (X,Y,Y), (X,Y), (X,Y) -> (X,Y)
    """log pi where training with these opponents rests."""
    if args.pairs_from == "policy":
        return exact.nash(ref, asked, args.tau)[0]
    if args.pairs_from == "mixture":
        return exact.mirror(ref, asked, args.tau, args.b)[0]
    return data.optimum(ref, asked, mu.exp(), args.tau)


def train(policy, world, judge, mu, args):  # -> (X,Y), (X,Y)
    """Trains the policy; returns where it is and where it should be."""
    print(f"{METHODS[args.pairs_from]}:")
    ref = world.exact["ref"]
    asked = args.tau * ipo.target(judge, args.tau)  # with the paper's Psi it is p - 1/2
    end = answer(asked, mu, ref, args)
    Path(args.out, "ckpt.pt").unlink(missing_ok=True)  # or ipo.train would go on from there
    evaluate = start.distance("kl_answer", world, end)
    ipo.train(policy, batches(policy, ref, judge, mu, args), args, evaluate)
    return world.table(policy), end


def parse(argv):
    own = start.parser(__doc__)
    own.add_argument("--pairs_from", default="policy", choices=[*METHODS][:3], help="see above [policy]")
    own.add_argument("--labels_by", default="truth", choices=["truth", "reward"], help="the judge [truth]")
    own.add_argument("--b", type=float, default=0.5, help="mixture: the reference's exponent [0.5]")
    own.add_argument("--offline", action="store_true", help="train offline, too, and compare")
    args = start.parse(own, argv, "--out out/online", ["loss"], world=True)
    if args.pairs_from != "mixture":
        start.refuse_given(argv, ["b"], "does nothing without --pairs_from mixture")
    if args.pairs_from != "rejection" and args.labels_by == "truth":
        start.refuse_given(argv, ["pairs"], "does nothing where pairs are drawn afresh")
    if not 0 <= args.b < 1:
        raise data.Refused("--b takes 0 to below 1")
    return args


def run(argv):
    args = parse(argv)
    policy, world = start.start(args)
    ref, mu = world.exact["ref"], world.mu.log()
    judge, r = world.pstar, world.reward
    if args.labels_by == "reward":
        r = table(fit(policy, world, args, args.steps, lr=3e-3), world)
        judge = exact.margins(r, 0 * r).sigmoid()
    if args.offline:
        other = start.changed(args, pairs_from="offline")
        theirs, their_end = train(copy.deepcopy(policy), world, judge, mu, other)
    if args.pairs_from == "rejection":
        mu = accepted(ref, r, args)
    logp, end = train(policy, world, judge, mu, args)
    figures = {"KL to its exact answer": data.kl(logp, end), "KL to the reference": data.kl(logp, ref),
               "win rate": exact.win(logp, world.pstar, world.mu)}
    text = f"{METHODS[args.pairs_from]} ends {data.kl(logp, end):.4f} nats from its exact answer"
    if args.offline:
        own = data.kl(theirs, their_end)
        apart = data.kl(logp, theirs)
        wins = exact.win(logp, world.pstar, theirs.exp())
        figures |= {"offline to its answer": own, "KL(this||offline)": apart,
                    "... of exact answers": data.kl(end, their_end), "wins against offline": wins}
        text += (f", offline IPO {own:.4f} from its own. The two ends are {apart:.4f} nats apart, and the "
                 f"first wins {wins:.1%} of its duels with the second")
    start.finish(args, f"{text} ({args.data}, tau {args.tau}).", ipo.means(figures))


if __name__ == "__main__":
    raise SystemExit(start.main("online", run))
