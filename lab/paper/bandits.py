"""Do IPO and DPO do on the paper's bandits what figures 1 and 2 show?

  python -m lab.paper.paper --data d1                          figure 1
  python -m lab.paper.paper --data d3prime                     figure 2
  python -m lab.paper.paper --data d1 --batch_size 0           all pairs in every step: the exact optimum
  python -m lab.paper.paper --data bandit2 --tau 0.1 --steps 2000

Azar et al. 2023, section 5: three actions, no prompt, one logit for each, certain pairs (winner first), a
uniform reference; Adam at .01, 18,000 steps of 9 pairs drawn with replacement. A policy for each loss, tau
and seed, all in one table. Printed: mean over seeds, 1.96 standard errors of it, eq. 7's optimum with p* as
the pairs say (1/2 for actions that never meet), mean minus optimum. With all pairs the rate falls to 0, or
Adam would circle the optimum. Trap: the D3 that is printed, {ab, ba}, cannot give figure 2. c is in no pair
and a, b balance, so all three stay at 1/3 for either loss. The text around the figure (one action never wins,
two stay balanced) fits d3prime = {ac, bc}. Trap: DPO is greedy on d1 at every tau, in the end: at tau 10
these steps bring it to pi(a) = .82 only.
Answer: yes. d1, tau .1, .5, 1: IPO's pi(a) ends at .964, .562, .450 (optimum .964, .563, .448), DPO's at
1.000 each.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch

import data
import ipo
from lab.common import pictures

BANDITS = {"bandit2": "ab", "d1": "ab bc ac", "d2": "ab bc ca", "d3": "ab ba", "d3prime": "ac bc"}


def bandit(name):  # -> (N,), (N,), (1,Y,Y)
    """Winners and losers of the pairs, as numbers of actions, and p* as the pairs say."""
    pairs = [["abc".index(action) for action in pair] for pair in BANDITS[name].split()]
    winner, loser = torch.tensor(pairs).T
    Y = 2 if name == "bandit2" else 3  # d3 has three actions, too: c is in no pair
    wins = torch.zeros(1, Y, Y, dtype=torch.float64)
    wins[0, winner, loser] = 1
    return winner, loser, (wins / (wins + wins.mT)).nan_to_num(0.5)


def train(args, winner, loser, Y):
    """Yields (step, log pi (L,K,S,Y)), first the reference: L losses, K taus, S seeds. Raises Stopped."""
    L, K, S, N = len(args.loss), len(args.tau), args.seeds, len(winner)
    generator = torch.Generator().manual_seed(args.seed)
    tau = torch.tensor(args.tau, dtype=torch.float64)[:, None, None]
    theta = torch.zeros(L, K, S, Y, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], args.lr)
    pairs = torch.arange(N).expand(K, S, N)
    for step in range(args.steps):
        logp = theta.log_softmax(-1)
        if step % args.log_every == 0:
            yield step, logp.detach()
        if args.batch_size:
            pairs = torch.randint(N, (K, S, args.batch_size), generator=generator)
        else:
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        drawn = pairs.expand(L, -1, -1, -1)
        h = logp.gather(-1, winner[drawn]) - logp.gather(-1, loser[drawn])  # the uniform reference cancels
        costs = [ipo.LOSSES[loss](h[i], torch.ones(()), tau) for i, loss in enumerate(args.loss)]
        optimizer.zero_grad()
        torch.stack(costs).mean(-1).sum().backward()  # a sum: policies share nothing
        optimizer.step()
        if not theta.isfinite().all():
            raise ipo.Stopped(f"step {step + 1}: a logit is not finite; lower --lr or raise --tau")
    yield args.steps, theta.detach().log_softmax(-1)


def evaluate(logp, winner, loser):  # (S,Y), (N,), (N,) -> numbers by name
    """Over seeds: mean probabilities, 1.96 standard errors, mean margin of the pairs; None: infinite."""
    pi, h = logp.exp(), logp[:, winner] - logp[:, loser]
    error = 1.96 * pi.std(0) / len(pi) ** 0.5
    numbers = data.finite({"h": h.mean()})
    return numbers | {"pi": pi.mean(0).tolist(), "interval": error.tolist()}


def pose(loss, tau, winner, loser, pstar):  # -> Run
    """What a loss is to do at one tau: its pi* and target. Raises Refused if a squared target is infinite."""
    uniform = torch.full_like(pstar[0, :1], 1 / pstar.shape[1])
    worth, certain = ipo.WORTH[loss], torch.ones(1)
    best = data.optimum(uniform.log(), worth(pstar), uniform, tau)
    target = (worth(certain) - worth(1 - certain)) / (2 * tau)
    start = ipo.LOSSES[loss](torch.zeros(1), certain, tau)
    if not start.isfinite():
        raise ipo.Refused("psi asks for an infinite margin at p = 1, and these pairs are certain; edit it")
    print(f"{loss}, tau {tau:g}: loss {start.item():.6g} at step 0, where h = 0")
    report = {"before": data.finite({"target": target}), "opt": evaluate(best.expand(2, -1), winner, loser)}
    return pictures.Run(f"{loss}, tau {tau:g}", {"loss": loss, "tau": tau}, [], [], report)


def print_table(runs):
    """A line for each action."""
    print(f"{'':18}{'mean':>10}{'1.96 s.e.':>11}{'optimum':>10}{'difference':>12}")
    for run in runs:
        after, best = run.evals[-1], run.report["opt"]["pi"]
        for action, pi, error, exact in zip("abc", after["pi"], after["interval"], best):
            print(f"{run.out + ': ' + action:18}{pi:10.6f}{error:11.6f}{exact:10.6f}{pi - exact:+12.1e}")


def draw_actions(runs, path, rows):
    """Figures 1 and 2: probabilities against the step, a row per tau, a column per loss; dashed: pi*."""
    figure, axes = pictures.panels(rows, len(runs) // rows)
    for axis, run in zip(axes.T.flatten(), runs):
        pi = torch.tensor([numbers["pi"] for numbers in run.evals]).T  # (Y, points)
        error = torch.tensor([numbers["interval"] for numbers in run.evals]).T
        for action, best in enumerate(run.report["opt"]["pi"]):
            colour, style = pictures.COLOURS[action], pictures.STYLES[action]
            low, high = pi[action] - error[action], pi[action] + error[action]
            axis.plot(run.steps, pi[action], style, color=colour, label="abc"[action])
            axis.fill_between(run.steps, low, high, color=colour, alpha=0.3, linewidth=0)
            axis.axhline(best, color=colour, **pictures.DASHED)
        axis.set(title=run.out, ylim=(-0.03, 1.03))
    figure.supxlabel("step")
    figure.supylabel("probability")
    axes[0, 0].legend(title="action")
    pictures.save(figure, path)


def experiment(args):
    """Trains all policies at once; leaves report.json, actions.png and margins.png in --out."""
    winner, loser, pstar = bandit(args.data)
    runs = [pose(loss, tau, winner, loser, pstar) for loss in args.loss for tau in args.tau]
    # a bandit's files are made again in seconds, so they are replaced
    again = os.path.exists(f"{args.out}/report.json") and ipo.saved_flags(args.out).get("data") in BANDITS
    ipo.claim(argparse.Namespace(**vars(args), resume=False, overwrite=again))
    for step, logp in train(args, winner, loser, pstar.shape[1]):
        for run, policies in zip(runs, logp.flatten(0, 1)):
            run.steps.append(step)
            run.evals.append(evaluate(policies, winner, loser))
    report = {run.out: run.report | {"after": run.evals[-1]} for run in runs}
    Path(f"{args.out}/report.json").write_text(json.dumps(report, indent=1))
    print_table(runs)
    draw_actions(runs, f"{args.out}/actions.png", len(args.tau))
    pictures.draw_runs(runs, f"{args.out}/margins.png")


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = ipo.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(flag, default, meaning, **more):
        more.setdefault("type", type(default))
        parser.add_argument(flag, default=default, help=f"{meaning} [{default}]", **more)

    add_argument("--data", "d1", "the bandit", choices=BANDITS)
    add_argument("--loss", ["ipo", "dpo"], "losses", nargs="+", type=str, choices=ipo.WORTH)
    add_argument("--tau", [0.1, 0.5, 1.0], "taus", nargs="+", type=float)
    add_argument("--steps", 18_000, "steps of training")
    add_argument("--batch_size", 9, "pairs in a step, drawn with replacement; 0: all, and the rate falls")
    add_argument("--lr", 0.01, "Adam's learning rate")
    add_argument("--seeds", 10, "policies for each loss and tau")
    add_argument("--seed", 0, "fixes the draws of all")
    add_argument("--log_every", 100, "steps from one point of the curves to the next")
    add_argument("--out", "out/paper", "folder of report.json and pictures")
    try:
        args = parser.parse_args(argv)
        least = min(*args.tau, args.lr, args.steps, args.log_every)
        if not least > 0 or args.seeds < 2 or args.batch_size < 0:
            raise ipo.Refused("numbers must be above 0, --seeds above 1; --batch_size may be 0")
        experiment(args)
        return 0
    except (ipo.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print("paper.py:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, ipo.Refused) else 1


if __name__ == "__main__":
    sys.exit(main())
