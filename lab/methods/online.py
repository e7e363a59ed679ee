"""Where does IPO end when its pairs come from the policy itself?

IPO fits log pi(y)/ref(y) to the mean of its targets over opponents y' ~ mu, whatever mu is (eq. 7). Draw both
responses of a pair from the policy as it is now, and mu moves along: pi rests where it is its own answer.

  --pairs_from mu         offline IPO whose pairs never run out: pi = ref exp(E_{y'~mu} p*(y>y') / tau) / Z
  --pairs_from policy     online IPO: mu = pi, the Nash policy of the regularised game (Munos et al.)
  --pairs_from mixture    IPO-MD (Calandriello et al.): mu = pi^(1-b) ref^b / Z, over whole responses
  --pairs_from rejection  RSO (Liu et al.): mu = ref exp(r/beta) / Z: candidates from ref, accepted by a coin
  --labels_by reward      RLAIF: a reward model of the world's pairs judges, s(r-hat - r-hat') for p*

Traps: the sampler has no gradient; both responses are independent draws; a mixture token by token is another
mixture; rejection needs the largest reward of all, not that of its candidates, and what its pairs rarely hold
is not taught: some of the reference's own, --from_ref, cure that.
`python -m lab.methods.online --plot FOLDER FOLDER ... --out OUT` draws OUT/online.png from finished runs.
Answer: at the Nash policy. Tau .2, seeds 0 to 2, KL(pi||Nash): bt .0032 .0039 .0039, cyclic .0022 .0022
.0023, deterministic .0028 .0031 .0031; tau .1: .0109 to .0126, .0087 to .0093, .0118 to .0147.
"""
import json
import sys
import time
from pathlib import Path

import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.methods import reward

METHODS = {"mu": "IPO, endless pairs", "policy": "online IPO", "mixture": "IPO-MD", "rejection": "RSO"}


def flags(argv):
    """ipo.py's flags, the reward model's, and these. Raises Refused."""
    parser = reward.flags(__doc__)
    parser.add_argument("--pairs_from", default="policy", choices=METHODS, help="both responses' mu [policy]")
    parser.add_argument("--labels_by", default="truth", choices=["truth", "reward"], help="the judge [truth]")
    parser.add_argument("--b", type=float, default=0.5, help="mixture: the reference's exponent [0.5]")
    parser.add_argument("--beta", type=float, default=1.0, help="rejection: rewards in units of beta [1.0]")
    parser.add_argument("--from_ref", type=float, default=0.0, help="rejection: share left as ref's [0.0]")
    parser.add_argument("--plot", nargs="+", metavar="FOLDER", help="draw OUT/online.png from these runs")
    own, rest = parser.parse_known_args(argv)
    args = ipo.parse(rest)
    vars(args).update(vars(own))
    if args.data not in data.WORLDS or args.resume or args.logp == "mean":
        raise ipo.Refused("--data must name a world; --resume and --logp mean have no place here")
    if not (0 <= args.b < 1 and 0 <= args.from_ref < 1 and args.beta > 0):
        raise ipo.Refused("--b and --from_ref must be from 0 to below 1, --beta above 0")
    args.device = "cpu"  # tables of a world are small
    return args


def opponents(logp, fixed, ref, args):  # (X,Y), (X,Y), (X,Y) -> (X,Y)
    """log mu, where responses come from if the policy is log pi; `fixed` if no policy moves it."""
    if args.pairs_from == "policy":
        return logp
    if args.pairs_from == "mixture":
        return ((1 - args.b) * logp + args.b * ref).log_softmax(-1)
    return fixed


def batches(policy, world, judge, fixed, args, generator):
    """Yields (Batch, its reference log-probs) without end: fresh pairs, labels by `judge` (X,Y,Y)."""
    table, stream = exact.Table(world), data.World(args.data)
    stream.pstar = judge
    pairs, ref_logp = torch.arange(args.batch_size), world.ref.flatten().float()
    while True:
        with torch.no_grad():  # the sampler is no part of the loss
            logp = table(policy).double()
        mu = opponents(logp, fixed, world.ref, args).exp()
        if not mu.max() <= 0.999:
            raise ipo.Stopped("the policy has one response left, or none; lower --lr or raise --tau")
        stream.draw(args.batch_size, mu, args.labels, args.noise, generator)
        yield stream.pairs.batch(pairs), ref_logp[stream.pairs.pair_rows(pairs)]


def pool(ref, r, args, generator):  # (X,Y), (X,Y) -> (X,Y)
    """--pairs candidates a prompt from ref, each kept with probability exp((r - max r) / beta): exact draws
    from ref exp(r/beta) / Z. The log of the shares of those kept; the share --from_ref needs no coin."""
    y = torch.multinomial(ref.exp(), args.pairs, replacement=True, generator=generator)
    chance = ((r - r.amax(-1, keepdim=True)) / args.beta).exp()
    kept = torch.rand(y.shape, generator=generator) < chance.gather(1, y)
    print(f"rejection: {kept.double().mean():.2%} of {args.pairs:,} candidates a prompt are accepted")
    if not kept.any(1).all():
        raise ipo.Refused("none was accepted: give a larger --beta or more --pairs")
    counts = torch.zeros_like(ref).scatter_add(1, y, kept.double())
    shares = counts / counts.sum(-1, keepdim=True)
    return ((1 - args.from_ref) * shares + args.from_ref * ref.exp()).log()


def asked(judge, args):  # (X,Y,Y) -> (X,Y,Y)
    """tau times the margin that a pair's labels ask for on average: with the paper's Psi p - 1/2."""
    q = judge + args.noise * (1 - 2 * judge)
    if args.loss == "dpo":
        gap = q.logit()
        worth = gap[:, :, :1]  # against the first response
        if not torch.allclose(gap, worth - worth.mT):
            raise ipo.Refused("--loss dpo: labels are not Bradley-Terry's, so its answer is unknown here")
        return gap
    certain = ipo.target(torch.ones_like(q), args.tau)
    target = ipo.target(q, args.tau) if args.labels == "soft" else (2 * q - 1) * certain
    return args.tau * target


def answer(worth, fixed, ref, args):  # (X,Y,Y), (X,Y), (X,Y) -> (X,Y)
    """log pi where training with these opponents rests."""
    if args.pairs_from == "policy":
        return exact.nash(ref, worth, args.tau)[0]
    if args.pairs_from == "mixture":
        return exact.mirror(ref, worth, args.tau, args.b)[0]
    return data.optimum(ref, worth, fixed.exp(), args.tau)


def run(args):
    """SFT, a reward model if one is needed, training on fresh pairs, and the distance to the exact answer."""
    begin = time.process_time()
    policy, world, _, generator = start.start(args)
    ref, judge, r, fixed = world.ref, world.pstar, world.reward, world.mu.log()
    if args.labels_by == "reward":
        r = reward.rewards(reward.fit(policy, world, args, generator), world, args)
        judge = (r[:, :, None] - r[:, None, :]).sigmoid()
    if args.pairs_from == "rejection":
        fixed = pool(ref, r, args, generator)
    worth = asked(judge, args)
    world.exact["nash"] = exact.nash(ref, worth, args.tau)[0]
    world.exact["answer"] = answer(worth, fixed, ref, args)
    report = {name: world.numbers(logp) for name, logp in world.exact.items()}
    report["before"] = world.evaluate(policy)
    ipo.train(policy, batches(policy, world, judge, fixed, args, generator), args, world.evaluate)
    after = report["after"] = world.evaluate(policy)
    ipo.print_report(report)
    name = f"{METHODS[args.pairs_from]} ({args.loss}, labels by {args.labels_by})"
    found = {"name": name, "kl": after["kl_answer"], "seconds": time.process_time() - begin} | after | report
    Path(f"{args.out}/report.json").write_text(json.dumps(found, indent=1))


def picture(folders, out):
    """OUT/online.png: KL to the Nash policy and to the offline optimum; dashed, where each run should end."""
    from matplotlib.figure import Figure
    Path(out).mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for color, folder in enumerate(folders):
        name = METHODS[ipo.saved_flags(folder)["pairs_from"]]
        report = json.loads(Path(f"{folder}/report.json").read_text())
        lines = [json.loads(line) for line in Path(f"{folder}/metrics.jsonl").read_text().splitlines()]
        for axis, key in zip(axes, ("kl_nash", "kl_opt")):
            curve = [report["before"][key]] + [line["eval"][key] for line in lines]
            axis.plot([0] + [line["step"] for line in lines], curve, f"C{color}", label=name)
            axis.axhline(report["answer"][key], color=f"C{color}", linestyle="--", linewidth=1)
            axis.set(xlabel="step", ylabel=f"KL(pi||{key[3:]}), nats")
    axes[0].legend()
    figure.savefig(f"{out}/online.png", dpi=110)


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = flags(argv)
        picture(args.plot, args.out) if args.plot else run(args)
        return 0
    except (ipo.Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt, ImportError) as error:
        print("online:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (ipo.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
