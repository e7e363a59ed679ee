"""Do IPO and DPO do on the paper's bandits what figures 1 and 2 show?

  python -m lab.paper.bandits --data d1                          figure 1
  python -m lab.paper.bandits --data d3prime                     figure 2
  python -m lab.paper.bandits --data bandit2 --tau 0.1 --steps 2000      a single pair, and its margin

Azar et al. 2023, section 5: three actions, no prompt, one logit for each, certain pairs (winner first), a
uniform reference; Adam at .01, 18,000 steps of 9 pairs drawn with replacement. A policy for each loss, tau
and seed, all in one table. Printed: mean over seeds, 1.96 standard errors of it, eq. 7's optimum with p* as
the pairs say (1/2 for actions that never meet), mean minus optimum. Pictures: actions.png, which is the
figure, and margins.png. Trap: the D3 that is printed, {ab, ba}, cannot give figure 2. c is in no pair and
a, b balance, so all three stay at 1/3 for either loss. The text around the figure (one action never wins, two
stay balanced) fits d3prime = {ac, bc}. Trap: DPO's optimum is a limit, and at a large tau it is far.
"""
import sys

import torch

import data
import ipo
from lab.common import pictures, start

BANDITS = {"bandit2": "ab", "d1": "ab bc ac", "d2": "ab bc ca", "d3": "ab ba", "d3prime": "ac bc"}
LOSSES = ["ipo", "dpo"]
DRAWN = 9     # pairs in a step, drawn with replacement
CLOSE = 0.02  # a probability that is nearer to its optimum than this has arrived


def bandit(name):  # -> (N,), (N,), (1,Y,Y)
    """Winners and losers of the pairs, as numbers of actions, and p* as the pairs say."""
    pairs = [["abc".index(action) for action in pair] for pair in BANDITS[name].split()]
    winner, loser = torch.tensor(pairs).T
    Y = 2 if name == "bandit2" else 3  # d3 has three actions, too: c is in no pair
    wins = torch.zeros(1, Y, Y, dtype=torch.float64)
    wins[0, winner, loser] = 1
    pstar = wins / (wins + wins.mT)
    return winner, loser, pstar.nan_to_num(0.5)


def pose(loss, tau, winner, loser, pstar):  # -> Run, its log empty
    """What a loss is to do: its loss at the reference, and pi* of eq. 7. Raises Refused."""
    h, certain = torch.zeros(()), torch.ones(())
    first = ipo.LOSSES[loss](h, certain, tau).item()
    if first == float("inf"):
        raise data.Refused("this psi asks for an infinite margin, as these pairs are certain; use another")
    Y = pstar.shape[1]
    mu = torch.full((1, Y), 1 / Y, dtype=torch.float64)  # the reference, too
    worth = ipo.PSI_OF[loss](pstar)
    best = data.optimum(mu.log(), worth, mu, tau)
    opt = numbers(best.expand(2, Y), winner, loser)
    flags = {"loss": loss, "tau": tau, "labels": "hard"}
    return pictures.Run(f"{loss}, tau {tau:g}", flags, [], {"loss": first}, opt)


def numbers(logp, winner, loser):  # (seeds,Y), (N,), (N,) -> numbers by name
    """Over seeds: mean margin of the pairs (None if infinite), mean probabilities, 1.96 standard errors."""
    pi = logp.exp()
    h = logp[:, winner] - logp[:, loser]  # the uniform reference cancels
    found = ipo.means({"h": h})
    found["pi"] = pi.mean(0).tolist()
    error = 1.96 * pi.std(0) / len(pi) ** 0.5
    found["error"] = error.tolist()
    return found


def train(args, winner, loser, Y):
    """Yields (step, log pi (losses, taus, seeds, Y)), first the reference. Raises Stopped."""
    taus = len(args.tau)
    generator = torch.Generator().manual_seed(args.seed)
    tau = torch.tensor(args.tau, dtype=torch.float64)[:, None, None]
    shape = len(LOSSES), taus, args.seeds, Y
    theta = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], args.lr)
    for step in range(args.steps):
        logp = theta.log_softmax(-1)
        if step % 100 == 0:
            yield step, logp.detach()
        drawn = taus, args.seeds, DRAWN
        pairs = torch.randint(len(winner), drawn, generator=generator)  # the same for both losses
        total = 0.0  # a sum over policies, since they share nothing
        for name, own in zip(LOSSES, logp):
            chosen = own.gather(-1, winner[pairs])
            rejected = own.gather(-1, loser[pairs])
            h = chosen - rejected
            cost = ipo.LOSSES[name](h, torch.ones(()), tau)
            total = total + cost.mean(-1).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if not theta.isfinite().all():
            raise ipo.Stopped(f"step {step + 1}: a logit is not finite; lower --lr or raise --tau")
    yield args.steps, theta.detach().log_softmax(-1)


def draw_actions(runs, path, rows):
    """Figures 1 and 2: probabilities against the step, a row per tau, a column per loss; dashed: pi*."""
    figure, axes = pictures.panels(rows, len(LOSSES))
    for axis, one in zip(axes.T.flatten(), runs):
        steps = [line["step"] for line in one.log]
        pi = torch.tensor([line["pi"] for line in one.log]).T        # (Y,points)
        error = torch.tensor([line["error"] for line in one.log]).T  # (Y,points)
        low, high = pi - error, pi + error
        for action, best in enumerate(one.opt["pi"]):
            colour = pictures.COLOURS[action]
            style = pictures.STYLES[action]
            axis.plot(steps, pi[action], style, color=colour, label="abc"[action])
            axis.fill_between(steps, low[action], high[action], color=colour, alpha=0.3)
            axis.axhline(best, color=colour, **pictures.DASHED)
        axis.set(title=one.name, xlabel="step", ylabel="probability")
        axis.set_ylim(-0.03, 1.03)
    axes[0, 0].legend(title="action")
    pictures.save(figure, path)


def table(runs):
    """Prints a line for each action -> {loss: the largest distance of a probability to its optimum}."""
    gaps = dict.fromkeys(LOSSES, 0.0)
    print("                        mean  1.96 s.e.   optimum  difference")
    for one in runs:
        loss, after = one.flags["loss"], one.log[-1]
        for action, best in enumerate(one.opt["pi"]):
            pi, error = after["pi"][action], after["error"][action]
            gap = pi - best
            name = f"{one.name}: {'abc'[action]}"
            print(f"{name:18}{pi:10.6f}{error:11.6f}{best:10.6f}{gap:+12.1e}")
            gaps[loss] = max(gaps[loss], abs(gap))
    return gaps


def parse(argv):
    own = start.parser(__doc__)
    add = own.add_argument
    add("--data", default="d1", choices=BANDITS, help="the bandit [d1]")
    add("--tau", nargs="+", type=float, default=[0.1, 0.5, 1.0], help="taus [0.1 0.5 1]")
    add("--steps", type=int, default=18_000, help="steps of training [18000]")
    add("--lr", type=float, default=0.01, help="Adam's learning rate [0.01]")
    add("--seeds", type=int, default=10, help="policies for each loss and tau [10]")
    add("--seed", type=int, default=0, help="fixes the draws of all [0]")
    add("--out", default="out/bandits", help="folder of report.json and pictures [out/bandits]")
    args = own.parse_args(argv)
    least = min(*args.tau, args.lr, args.steps)
    if not least > 0 or args.seeds < 2 or args.seed < 0:
        raise data.Refused("--tau, --lr and --steps must be above 0, --seeds above 1, --seed 0 or more")
    start.refuse_twice("--tau", args.tau)
    return args


def run(argv=None):
    args = parse(argv)
    winner, loser, pstar = bandit(args.data)
    runs = [pose(loss, tau, winner, loser, pstar) for loss in LOSSES for tau in args.tau]
    start.make_folder(args.out)
    for step, logp in train(args, winner, loser, pstar.shape[1]):
        for one, policies in zip(runs, logp.flatten(0, 1)):
            found = numbers(policies, winner, loser)
            one.log.append({"step": step, **found})
        if step % 5000 == 0:
            print(f"step {step:,}/{args.steps:,}", flush=True)
    gaps = table(runs)
    draw_actions(runs, f"{args.out}/actions.png", len(args.tau))
    pictures.draw_runs(runs, f"{args.out}/margins.png")
    arrived = max(gaps.values()) < CLOSE
    said = "Yes" if arrived else "Not yet, raise --steps"
    limit = " ".join(f"{pi:.3f}" for pi in runs[-1].opt["pi"])
    ours, theirs = gaps["ipo"], gaps["dpo"]
    answer = (f"{said}: on {args.data} IPO ends at most {ours:.4f} from its optimum at each tau, DPO at most "
              f"{theirs:.4f} from its limit ({limit}), which is the same at every tau.")
    columns = {}
    for one in runs:
        columns[one.name] = {"opt": one.opt, "after": one.log[-1]}
    start.finish(args, answer, {}, runs=columns)


if __name__ == "__main__":
    sys.exit(start.main("bandits", run))
