"""Do IPO and DPO do on the paper's bandits what figures 1 and 2 show?

  python -m lab.paper --data d1                          figure 1
  python -m lab.paper --data d3prime                     figure 2
  python -m lab.paper --data d1 --batch_size 0           all pairs in every step: the exact optimum
  python -m lab.paper --data bandit2 --tau 0.1 --steps 2000

Azar et al. 2023, section 5: three actions, no prompt, one logit for each, certain pairs (winner first), a uniform
reference; Adam at .01, 18,000 steps of 9 pairs drawn with replacement. A policy for each loss, tau and seed, all in
one table. Printed: mean over seeds, 1.96 standard errors of it, eq. 7's optimum with p* as the pairs say (1/2 for
actions that never meet), mean minus optimum. With all pairs the rate falls to 0, or Adam would circle the optimum.
Trap: the D3 that is printed, {ab, ba}, cannot give figure 2. c is in no pair and a, b balance, so all three stay at
1/3 for either loss. The text around the figure (one action never wins, two stay balanced) fits d3prime = {ac, bc}.
Trap: DPO is greedy on d1 at every tau, in the end: at tau 10 these steps bring it to pi(a) = .82 only.
Answer: yes. d1, tau .1, .5, 1: IPO's pi(a) ends at .964, .562, .450 (optimum .964, .563, .448), DPO's at 1.000 each.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch

import data
import ipo
from lab import plot

BANDITS = {"bandit2": "ab", "d1": "ab bc ac", "d2": "ab bc ca", "d3": "ab ba", "d3prime": "ac bc"}


def pairs_of(name):  # -> (N,), (N,)
    """Winners and losers of a bandit's pairs, as numbers of actions."""
    pairs = [["abc".index(action) for action in pair] for pair in BANDITS[name].split()]
    return torch.tensor(pairs).T


def optimum(winner, loser, loss, tau):  # (N,), (N,) -> (Y,)
    """pi* of the loss's Psi, eq. 7 with uniform reference and mu; a limit where Psi is infinite, nan if unknown."""
    actions = 1 + int(torch.cat([winner, loser]).max())
    wins = torch.zeros(actions, actions, dtype=torch.float64)
    wins[winner, loser] = 1
    pstar = (wins / (wins + wins.T)).nan_to_num(0.5)[None]  # (1,Y,Y)
    uniform = torch.full((1, actions), 1 / actions, dtype=torch.float64)
    worth = ipo.WORTH.get(loss, ipo.no_worth)(pstar)
    return data.optimum(uniform.log(), worth, uniform, tau)[0].exp()


def train(args):
    """Yields (step, log pi (losses, taus, seeds, Y), h of every pair (losses, taus, seeds, N)). Raises Stopped."""
    winner, loser = pairs_of(args.data)
    losses, taus, N = len(args.loss), torch.tensor(args.tau, dtype=torch.float64)[:, None, None], len(winner)
    generator = torch.Generator().manual_seed(args.seed)
    shape = losses, len(taus), args.seeds, 1 + int(torch.cat([winner, loser]).max())
    theta = torch.zeros(shape, dtype=torch.float64, requires_grad=True)  # pi = ref at first
    optimizer = torch.optim.Adam([theta], args.lr)
    every = torch.arange(N).expand(*shape[:2], args.seeds, N)
