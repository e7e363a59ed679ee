"""Do a reward model and reinforcement learning end where DPO and IPO with Psi = logit end?

Under Bradley-Terry all three have the optimum ref exp(r/tau) / Z (Azar et al. 2023, proposition 1). Here each
starts from one reference and learns from soft labels: a reward model, then RLOO on it (lab/methods/rlhf.py); DPO
(eq. 4); IPO's loop with ipo.psi = torch.logit, whose target is logit(p)/tau. The table shows KL(row||column).
Trap: with hard labels IPO with Psi = logit has no finite target (p = 1), and each method has its own noise.
Answer: yes. Bt, tau .5, seeds 0 to 2: pairwise KL at most .0001, .0004 and .0002, DPO and IPO .00001 apart;
at tau .2 .0024, .0045 and .0027, RLHF being the far one, DPO and IPO at most .0001 apart.
"""
import copy
import sys

import torch

import data
import ipo
import model
from lab.methods import rlhf
from lab.common import start as begin


def others(args):
    """{name: policy} of DPO and of IPO's loop with Psi = logit; the same seed makes the same reference."""
    usual, psi = ipo.parse([]), ipo.psi
    policies = {}
    for loss in ("dpo", "ipo"):
        mine = copy.copy(args)
        mine.loss, mine.out = loss, f"{args.out}/{loss}"
        mine.steps, mine.lr = args.reward_steps, usual.lr
        try:
            ipo.psi = torch.logit
            ipo.run(mine)
        finally:
            ipo.psi = psi
        policies[loss] = model.load(f"{mine.out}/ckpt.pt")[0]
    return policies


def run(argv):
    args = rlhf.parse(["--labels", "soft", "--reward", "model", "--out", "out/equal", *argv], __doc__)
    if (args.data, args.labels, args.kl) != ("bt", "soft", "reward") or args.noise or args.ridge:
        raise data.Refused("--data must be bt, --labels soft, --kl reward, without --noise and --ridge: "
                           "elsewhere the three have other optima")
    policy, task = rlhf.rlhf(args)
    policies = {"rlhf": policy} | others(args)
    with torch.no_grad():
        tables = {name: task.table(policy).double() for name, policy in policies.items()}
    tables["exact"] = task.exact["_true"]
    report = {a: {b: data.kl(tables[a], tables[b]).item() for b in tables} for a in tables}
    print("\nKL(row||column)" + "".join(f"{name:>10}" for name in report))
    for name, row in report.items():
        print(f"{name:15}" + "".join(f"{value:10.5f}" for value in row.values()))
    figures = {f"{a}_{b}": value for a, row in report.items() for b, value in row.items() if a != b}
    return args, {"kl": max(figures.values())} | figures


if __name__ == "__main__":
    sys.exit(begin.report("equal", run, sys.argv[1:]))
