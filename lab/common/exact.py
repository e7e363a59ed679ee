"""Where do preference methods end, exactly? A policy as a table, and each fixed point by enumeration.

A world has X prompts and Y responses, so a policy is log pi(y|x), (X,Y). `Table` reads it off any language
model, differentiably, each distinct prefix once (1.5 ms; token by token a response costs 1.2 ms). On tables:

  minimise   any differentiable objective of log pi, LBFGS in float64: the answer that training approximates
  expected   the exact mean of a pair's cost over y, y' ~ mu, y != y', and over the label, a coin flip with p*
  nash       pi = ref exp(E_{y'~pi} p*(y>y') / tau) / Z, the regularised Nash policy, where online IPO ends
             (Munos et al. 2023, arXiv:2312.00886). Unique: the game is strictly concave-convex.
  mirror     IPO-MD's answer: both responses from the normalised pi^(1-b) ref^b
  rewards    Bradley-Terry's maximum-likelihood fit to endless pairs, also where no reward is true

Trap: the undamped iteration pi <- ref exp(P pi / tau) / Z converges only where the spectral radius of
(diag pi - pi pi^T)(P - 1/2) is below tau: always in bt, not in cyclic at tau .1, not in deterministic at .1.
`python -m lab.common.exact --data deterministic --tau 0.2` prints the answers of one world.
Answer: with the base distribution as reference and mu uniform, at tau .2 offline IPO's optimum is .0082 (bt),
.012 (cyclic) and .16 nats (deterministic) from the Nash policy; IPO-MD's answer (b .5) .0018, .0029 and .063.
"""
import argparse
import json
import os
import sys

import torch

import data
import ipo


class Table:
    """table(policy) -> (X,Y) log pi(y|x) of every response, differentiable; world: a data.World."""

    def __init__(self, world):
        tokens, mask = world.pairs.padded(torch.arange(world.reward.numel()))
        self.shape = world.reward.shape
        self.row, at = mask[:, 1:].nonzero(as_tuple=True)  # (S,), (S,) scored tokens
        self.ids = tokens[self.row, at + 1]
        nodes, where = {}, []
        for row, t in zip(self.row.tolist(), at.tolist()):
            prefix = tuple(tokens[row, :t + 1].tolist())
            where.append(nodes.setdefault(prefix, (len(nodes), row, t))[0])
        self.where = torch.tensor(where)  # (S,) into the distinct prefixes
        _, rows, self.at = torch.tensor(list(nodes.values())).T
        rows, self.first = rows.unique(return_inverse=True)  # the rows that hold all prefixes
        self.tokens = tokens[rows, :-1]
        self.wanted = torch.zeros_like(self.tokens, dtype=torch.bool).index_put(
            (self.first, self.at), torch.tensor(True))

    def __call__(self, policy):  # -> (X,Y)
        x = policy.hidden(self.tokens, self.wanted)[self.first, self.at]  # (prefixes,C)
        logp = policy.head(x).log_softmax(-1)[self.where, self.ids]       # (S,)
        total = logp.new_zeros(self.shape.numel()).index_add(0, self.row, logp)
        return total.view(self.shape)


def minimise(objective, start, steps=3000):  # start (X,Y) -> log pi (X,Y), float64
    """The table that minimises objective(log pi), from the log-probs `start`; a plateau may stop it."""
    theta = start.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=steps, max_eval=2 * steps, history_size=30,
                                  tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = objective(theta.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().log_softmax(-1)


def weights(mu):  # (X,Y) -> (X,Y,Y)
    """The probability of each ordered pair of independent draws from mu that are not equal."""
    pairs = mu[:, :, None] * mu[:, None, :] * (1 - torch.eye(mu.shape[1], dtype=mu.dtype))
    return pairs / pairs.sum((1, 2), keepdim=True)


def expected(cost, pstar, mu):  # (X,Y,Y), (X,Y,Y), (X,Y) -> ()
    """Mean over prompts of E cost(winner, loser); cost[x,y,y'] is what a pair costs that y won. By symmetry
    p*(y>y') stands for both orders, twice."""
    return 2 * (weights(mu) * pstar * cost).sum((1, 2)).mean()


def margins(logp, ref_logp):  # (X,Y), (X,Y) -> (X,Y,Y)
    """h of every pair of responses."""
    ratio = logp - ref_logp
    return ratio[:, :, None] - ratio[:, None, :]


def against(pstar, mu):  # (X,Y,Y), (X,Y) -> (X,Y)
    """E_{y'~mu} p*(y>y') of each response."""
    return (pstar * mu[:, None, :]).sum(-1)


def nash(ref_logp, pstar, tau, damped=True, steps=20_000):  # -> log pi (X,Y), largest residual
    """The regularised Nash policy. Damped steps tau / (tau + 1/2) in log space converge for every tau."""
    logp, step = ref_logp.clone(), tau / (tau + 0.5) if damped else 1.0
    for _ in range(steps):
        answer = (ref_logp + against(pstar, logp.exp()) / tau).log_softmax(-1)
        residual = (answer - logp).abs().max().item()
        if residual < 1e-13:
            break
        logp = ((1 - step) * logp + step * answer).log_softmax(-1)
    return logp, residual


def mirror(ref_logp, pstar, tau, b):  # -> log pi (X,Y), log mu (X,Y)
    """IPO-MD's answer: its mixture mu is Nash at tau / (1 - b), and pi is IPO's optimum against that mu."""
    mu = nash(ref_logp, pstar, tau / (1 - b))[0]
    return (ref_logp + against(pstar, mu.exp()) / tau).log_softmax(-1), mu


def exploitability(logp, ref_logp, pstar, tau):  # -> (), at least 0, and 0 only for Nash
    """What the best response to pi gains over pi itself, in E[p*] - tau KL(.||ref)."""
    wins = against(pstar, logp.exp())
    best = tau * (ref_logp + wins / tau).logsumexp(-1)
    own = (logp.exp() * (wins - tau * (logp - ref_logp))).sum(-1)
    return (best - own).mean()


def spectral_radius(logp, pstar):  # -> () the largest over prompts
    """Of (diag pi - pi pi^T)(P - 1/2): the undamped iteration converges near this pi if it is below tau."""
    pi = logp.exp()
    spread = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    return torch.linalg.eigvals(spread @ (pstar - 0.5)).abs().max()


def rewards(pstar, mu):  # -> (X,Y), mean 0
    """The Bradley-Terry fit to endless pairs: it exists also where preferences are intransitive."""
    def loss(logits):  # minimise hands log-probs over: rewards up to a constant
        return -expected(torch.nn.functional.logsigmoid(margins(logits, 0 * logits)), pstar, mu)
    r = minimise(loss, torch.zeros_like(mu))
    return r - r.mean(-1, keepdim=True)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", choices=data.WORLDS, default="deterministic", help="world [deterministic]")
    parser.add_argument("--tau", type=float, default=0.2, help="pull to the reference [0.2]")
    parser.add_argument("--b", type=float, default=0.5, help="share of ref in IPO-MD's mixture [0.5]")
    parser.add_argument("--seed", type=int, default=0, help="nothing here is drawn: for the form's sake [0]")
    parser.add_argument("--out", default="out/exact", help="folder of report.json [out/exact]")
    args = parser.parse_args(argv)
    if not 0 < args.tau < 1e9 or not 0 <= args.b < 1:
        print("exact: --tau must be > 0, --b from 0 to below 1", file=sys.stderr)
        return 2
    world = data.World(args.data)
    ref = (world.base + 1e-4).log().expand_as(world.reward).log_softmax(-1)  # or "" would have probability 0
    uniform = torch.full_like(ref, 1 / ref.shape[1])
    best = data.optimum(ref, world.pstar, uniform, args.tau)
    equal, residual = nash(ref, world.pstar, args.tau)
    mixed = mirror(ref, world.pstar, args.tau, args.b)[0]
    report = {
        "kl_ref": data.kl(equal, ref).item(),
        "win": (equal.exp() * against(world.pstar, uniform)).sum(-1).mean().item(),
        "residual": residual,
        "exploitability": exploitability(equal, ref, world.pstar, args.tau).item(),
        "spectral_radius": spectral_radius(equal, world.pstar).item(),
        "kl_offline_to_nash": data.kl(best, equal).item(),
        "kl_mirror_to_nash": data.kl(mixed, equal).item(),
    }
    for name, value in report.items():
        print(f"{name:20} {value:12.4g}")
    os.makedirs(args.out, exist_ok=True)
    with open(f"{args.out}/report.json", "w") as file:
        json.dump(report, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
