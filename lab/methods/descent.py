"""How is a policy trained on any loss, and how far does it end from the exact minimiser of that loss?

This is no program itself; margin_losses, beyond_the_margin and kto import it. A world's policy is a table of
400 log-probs for each prompt, so the mean of a loss over all pairs and labels is a sum, and LBFGS finds the
table that minimises it. Trap: a loss that falls without end has no minimiser. If log pi/ref passes 100 nats
this is taken to be so, and the row shows a dash.
"""
import torch

import data
import ipo
import model
from lab.common import exact


def fit(policy, losses, args, evaluate):
    """Descends on each of `losses`, which are computed when they are asked for. Leaves ckpt.pt in --out.

    evaluate(policy) gives numbers by name for the log lines. Raises ipo.Stopped.
    """
    optimizer, log = ipo.adam(policy), []
    for step, loss in enumerate(losses, 1):
        loss.backward()
        ipo.optimizer_step(policy, optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            numbers = {"batch loss": loss.item(), **evaluate(policy)}
            ipo.told(f"step {step}/{args.steps}", numbers)
            log.append({"step": step, **numbers})
            model.save(f"{args.out}/ckpt.pt", policy, args, step=step, log=log)


def mean_over_pairs(cost, mu):  # (X,Y,Y), (X,Y) -> ()
    """The mean of cost[x,y,z] over pairs of independent draws y, z from mu, equal ones among them."""
    return torch.einsum("xy,xz,xyz->x", mu, mu, cost).mean()


class Row(dict):
    """A row of a table, {column: number, text or None}. A column is as wide as its name, or 7 characters."""

    def __str__(self):
        cells = []
        for name, value in self.items():
            shown = f"{value:z.4f}" if isinstance(value, float) else value or "-"
            cells.append(shown.rjust(max(len(name), 7)))
        return "  ".join(cells)


def table(first, rows):  # a name for the first column, {name: Row} -> figures for start.finish
    """The rows with their head."""
    head = Row({name: name for name in next(iter(rows.values()))})
    return {first: str(head), **rows}


def lowest(mean, logp, ref):  # -> log pi (X,Y)
    """The minimiser, by LBFGS from logp; or a policy 100 nats from ref, where the search is given up."""
    for _ in range(5):
        logp = exact.minimise(mean, logp, 100)
        if (logp - ref).abs().max() > 100:
            break
    return logp


def measured(mean, trained, source, true):  # -> Row, log pi (X,Y)
    """Of one run: where its policy lies, and its distance from the minimiser of mean(log pi).

    LBFGS starts from the reference and from the trained policy, and the lower of the two ends counts.
    true (X,Y,Y): the preferences that the win rate is of.
    """
    ref = source.exact["ref"]
    found = [lowest(mean, start, ref) for start in (ref, trained)]
    values = torch.stack([mean(logp) for logp in found])
    best = found[values.argmin()]
    numbers = {"KL to ref": data.kl(trained, ref), "win rate": exact.win(trained, true, source.mu)}
    numbers["KL to its minimiser"] = data.kl(trained, best)
    numbers["loss above it"] = mean(trained) - values.min()
    numbers["two starts apart"] = values.max() - values.min()
    row = Row(ipo.means(numbers))
    if (best - ref).abs().max() > 100:
        row["KL to its minimiser"] = row["loss above it"] = None
    return row, best
