"""Do IPO and DPO do on the paper's bandits what figures 1 and 2 show?

  python -m lab.paper.bandits --data d1                          figure 1
  python -m lab.paper.bandits --data d3prime                     figure 2
  python -m lab.paper.bandits --data bandit2 --tau 0.1 --steps 2000      a single pair, and its margin

Azar et al. 2023, section 5: three actions, no prompt, one logit for each, certain pairs (winner first), a
uniform reference; Adam at .01, 18,000 steps of 9 pairs drawn with replacement. A policy for each loss, tau
and seed, all in one table. Printed: means over ten seeds, and eq. 7's optimum with p* as the pairs say (1/2
for actions that never meet). Pictures: actions.png, which is the figure, and margins.png. Trap: the D3 that
is printed, {ab, ba}, cannot give figure 2. c is in no pair and a, b balance, so all three stay at 1/3 for
either loss. The text around the figure (one action never wins, two stay balanced) fits d3prime = {ac, bc}.
Trap: DPO's optimum is a limit, and at a large tau it is far.
"""
import torch

import data
import ipo
from lab.common import pictures, start

BANDITS = {"bandit2": "ab", "d1": "ab bc ac", "d2": "ab bc ca", "d3": "ab ba", "d3prime": "ac bc"}
LOSSES = ["ipo", "dpo"]
SEEDS = 10    # policies for each loss and tau
DRAWN = 9     # pairs in a step, drawn with replacement
CLOSE = 0.02  # a probability that is nearer to its optimum than this has arrived


def bandit(name):  # -> (N,), (N,), (1,Y,Y)
    """Winners and losers of the pairs, as numbers of actions, and p* as the pairs say."""
    pairs = BANDITS[name].split()
    winner = torch.tensor(["abc".index(first) for first, _ in pairs])
    loser = torch.tensor(["abc".index(second) for _, second in pairs])
    Y = 2 if name == "bandit2" else 3  # d3 has three actions, too: c is in no pair
    wins = torch.zeros(1, Y, Y, dtype=torch.float64)
    wins[0, winner, loser] = 1
    pstar = wins / (wins + wins.mT)
    return winner, loser, pstar.nan_to_num(0.5)


def pose(loss, tau, winner, loser, pstar):  # -> Run, its log empty
    """What a loss is to do: its loss at the reference, and pi* of eq. 7. Raises Refused."""
    certain = torch.ones(())
    first = ipo.LOSSES[loss](0 * certain, certain, tau)
    if not first.isfinite():
        raise data.Refused("this psi asks for an infinite margin, as these pairs are certain; use another")
    mu = torch.full_like(pstar[:, 0], 1 / pstar.shape[1])  # (1,Y), the reference, too
    worth = ipo.PSI_OF[loss](pstar)
    best = data.optimum(mu.log(), worth, mu, tau)
    opt = numbers(best, winner, loser)
    flags = {"loss": loss, "tau": tau, "labels": "hard"}
    return pictures.Run(flags, [], {"loss": first.item()}, opt)


def numbers(logp, winner, loser):  # (seeds,Y), (N,), (N,) -> numbers by name
    """Over seeds: mean margin of the pairs (None if infinite), mean probabilities."""
    h = logp[:, winner] - logp[:, loser]  # the uniform reference cancels
    found = ipo.means({"h": h})
    found["pi"] = logp.exp().mean(0).tolist()
    return found


def train(args, winner, loser, Y):
    """Yields (step, log pi (losses, taus, seeds, Y)), first the reference."""
    generator = torch.Generator().manual_seed(args.seed)
    tau = torch.tensor(args.tau, dtype=torch.float64)[:, None, None]
    taus = len(args.tau)
    theta = tau.new_zeros(len(LOSSES), taus, SEEDS, Y, requires_grad=True)
    optimizer = torch.optim.Adam([theta], 0.01)
    for step in range(args.steps):
        logp = theta.log_softmax(-1)
        if step % 100 == 0:
            yield step, logp.detach()
        drawn = taus, SEEDS, DRAWN
        pairs = torch.randint(len(winner), drawn, generator=generator)  # the same for both losses
        total = 0.0  # a sum over policies, since they share nothing
        for name, own in zip(LOSSES, logp):
            chosen = own.gather(-1, winner[pairs])
            rejected = own.gather(-1, loser[pairs])
            h = chosen - rejected
            cost = ipo.LOSSES[name](h, torch.ones(()), tau)
            total += cost.mean(-1).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    yield args.steps, theta.detach().log_softmax(-1)


def draw_actions(runs, path, rows):
    """Figures 1 and 2: probabilities against the step, a row per tau, a column per loss; dashed: pi*."""
    figure, axes = pictures.panels(rows, len(LOSSES))
    for axis, (name, one) in zip(axes.T.flatten(), runs.items()):
        steps = [line["step"] for line in one.log]
        for action, best in enumerate(one.opt["pi"]):
            pi = [line["pi"][action] for line in one.log]
            colour = pictures.COLOURS[action]
            axis.plot(steps, pi, color=colour, label="abc"[action])
            axis.axhline(best, color=colour, **pictures.DASHED)
        axis.set(title=name, xlabel="step", ylabel="probability")
        axis.set_ylim(-0.03, 1.03)
    axes[0, 0].legend(title="action")
    pictures.save(figure, path)


def run(argv=None):
    own = start.parser(__doc__, "out/bandits")
    own.add_argument("--data", default="d1", choices=BANDITS, help="the bandit [d1]")
    own.add_argument("--tau", nargs="+", type=float, default=[0.1, 0.5, 1.0], help="taus [0.1 0.5 1]")
    own.add_argument("--steps", type=int, default=18_000, help="steps of training [18000]")
    own.add_argument("--seed", type=int, default=0, help="fixes the draws of all [0]")
    args = own.parse_args(argv)
    if not min(*args.tau, args.steps) > 0:
        raise data.Refused("--tau and --steps must be above 0")
    start.refuse_twice("--tau", args.tau)
    winner, loser, pstar = bandit(args.data)
    runs = {}
    for loss in LOSSES:
        for tau in args.tau:
            runs[f"{loss}, tau {tau:g}"] = pose(loss, tau, winner, loser, pstar)
    start.make_folder(args.out)
    for step, logp in train(args, winner, loser, pstar.shape[1]):
        for one, policies in zip(runs.values(), logp.flatten(0, 1)):
            found = numbers(policies, winner, loser)
            one.log.append({"step": step, **found})
        if step % 5000 == 0:
            print(f"step {step:,}/{args.steps:,}")
    draw_actions(runs, f"{args.out}/actions.png", len(args.tau))
    pictures.draw_runs([*runs.values()], f"{args.out}/margins.png")
    finish(args, runs)


def finish(args, runs):
    """The answer, the table under it, and report.json."""
    gaps, rows, left = [], {}, {}
    for name, one in runs.items():
        left[name] = one._asdict()
        row = start.Row()
        for action, pi, best in zip("abc", one.log[-1]["pi"], one.opt["pi"]):
            gaps.append(abs(pi - best))
            row[action] = pi
            row[f"best {action}"] = best
        rows[name] = row
    said = "Yes" if max(gaps) < CLOSE else "Not yet, raise --steps"
    answer = f"{said}: on {args.data} IPO and DPO end at most {max(gaps):.4f} from their optima."
    start.finish(args, answer, start.table("probability of", rows), runs=left)


if __name__ == "__main__":
    raise SystemExit(start.main("bandits", run))
