"""Sum or mean of token log-probs?

What users ask of tools that average in IPO; world lengths, 1 to 7 tokens a response, mu = ref:
- Where does the paper average (huggingface/blog#1785)? Nowhere: log pi(y) in eq. 17 is of the whole response.
  The mean leads to ref exp(|y| (g/tau + c)), g = E p*, c normalises: at tau .5, .95 nats from pi*.
- Do lengths not cancel (huggingface/trl#1677)? Only if all are L: then the mean at tau is the sum at tau / L.
  Here the mean at 1.1 moves about as far as the sum at .2, but ends .055 nats from any sum's pi*, not .0029.
- Is beta then free of length (huggingface/trl#1265)? No: at .2 the mean's answer moves log pi/ref by up to
  28.8 nats. The sum's does by 2.9, and no two responses, however long, move apart by more than 1/tau = 5.
- Why a larger beta after that (huggingface/trl#1294)? Mean at 1.1 is nearest to sum at .22: 5 times.
- Must a recipe average, as for SimPO (meta-pytorch/torchtune#1291)? At one tau, KL to ref is 5.0 and not .54.
- Is the sum worse (h2oai/h2o-llmstudio#580)? Win rate: mean, tau 1.1, .700, of .712 that this KL can buy; sum
  .7171 of .7176. Does its loss depend on length? Both start at 1/(4 tau^2), whatever the lengths.
`python -m lab.paper.mean_form` makes the table of these figures in 2 minutes; flags not its own are ipo.py's.
Answer: the sum. It ends .0030 nats from its pi*; the mean 3.2 at the same tau, .055 from any pi* at 1.1.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
import ipo
import model

data.WORLDS["lengths"] = (["superb", "dull"], 7)  # 255 responses, of 1 to 7 tokens


def mean_optimum(ref_logp, asked, length):  # (X,Y) each -> (X,Y)
    """log of ref exp(|y| (asked + c)), where the mean form leads; asked is E_mu[target], up to a constant of
    the prompt. c makes it sum to one: with lengths it does not divide out, so it is bisected."""
    low, high = -asked.amax(-1, keepdim=True), -asked.amin(-1, keepdim=True)
    for _ in range(100):
        c = (low + high) / 2
        below = (ref_logp + length * (asked + c)).logsumexp(-1, keepdim=True) < 0
        low, high = torch.where(below, c, low), torch.where(below, high, c)
    return ref_logp + length * (asked + c)


class Lengths(ipo.WorldSource):
    """A world that knows where the mean form leads ("labels") and measures its loss and margins per token."""

    def __init__(self, args):
        # pose computes "labels" for the sum alone
        super().__init__(argparse.Namespace(**vars(args) | {"logp": "sum"}))
        self.mean = args.logp == "mean"
        self.length = (self.pairs.start.diff() - self.pairs.prompt_len).view_as(self.reward)  # (X,Y)

    def pose(self, policy, ref_logp, generator):
        super().pose(policy, ref_logp, generator)
        if self.mean:
            asked = self.exact["labels"] - self.ref  # E_mu[target], but for a constant of the prompt
            self.exact["labels"] = mean_optimum(self.ref, asked, self.length)

    def numbers(self, logp):  # (X,Y) -> numbers by name
        ratios = (logp - self.ref) / (self.length if self.mean else 1)
        ratios = ratios.flatten()[self.pairs.pair_rows(self.train)].float()
        measured = ipo.measure(ratios, torch.zeros(()), self.pairs.p, self.args)
        return super().numbers(logp) | measured


def against_sums(source, logp):
    """pi and the pi* of all tau, the sum's answers: tau of the nearest, KL(pi||it), and the win rate of the
    pi* that is as far from ref as pi: no policy of that KL wins more."""
    taus = np.geomspace(30, 0.003, 300)
    far, refs, wins = [], [], []
    for tau in taus:
        best = data.optimum(source.ref, ipo.psi(source.pstar), source.mu, tau)
        numbers = data.exact(best, source.ref, {}, source.pstar, source.mu, ipo.psi, tau)
        far.append(data.kl(logp, best).item())
        refs.append(numbers["kl_ref"])
        wins.append(numbers["win"])
    nearest = taus[np.argmin(far)]
    win = np.interp(data.kl(logp, source.ref).item(), refs, wins)
    return {"nearest tau": nearest.item(), "to that": min(far), "best win": win.item()}


def measured(args):
    """One run: a row of the table."""
    source = Lengths(args)
    ipo.run(args, source=source)
    report = json.loads(Path(f"{args.out}/report.json").read_text())
    after, own = report["after"], report["labels"]
    row = {"to pi*": after["kl_opt"], "to own": after["kl_labels"], "own to pi*": own["kl_opt"]}
    row |= {"to ref": after["kl_ref"], "win": after["win"], "own ratio": own["ratio"]}
    policy, _ = model.load(f"{args.out}/ckpt.pt")
    return row | against_sums(source, source.enumerate(policy.to(args.device)))


def compare(own, others):
    """Runs the sum and the means, prints the table, writes report.json."""
    common = ["--data", "lengths", "--mu", "ref", *others]
    args = ipo.parse([*common, "--out", own.out])
    if args.data not in data.WORLDS or args.loss != "ipo":
        raise ipo.Refused("--data and --loss: only a world and ipo have an exact answer in both forms")
    ipo.claim(args)
    report = {}
    for form, tau in [("sum", own.tau)] + [("mean", tau) for tau in own.mean_tau]:
        name = f"{form}-{tau:g}"
        flags = [*common, "--logp", form, "--tau", str(tau), "--out", f"{own.out}/{name}"]
        with open(f"{own.out}/{name}.log", "w") as log, contextlib.redirect_stdout(log):
            report[name] = measured(ipo.parse(flags))
        if len(report) == 1:
            print(f"{'nats':10}" + "".join(f"{column:>12}" for column in report[name]))
        print(f"{name:10}" + "".join(f"{ipo.show(value):>12}" for value in report[name].values()), flush=True)
        Path(f"{own.out}/report.json").write_text(json.dumps(report, indent=1))


def main(argv=None):
    """Returns the exit status, as ipo.main. Flags that are not ours are ipo.py's."""
    parser = ipo.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tau", type=float, default=0.2, help="of the sum [0.2]")
    parser.add_argument("--mean_tau", type=float, nargs="+", default=[0.2, 0.5, 0.8, 1.1, 1.5],
                        help="of the mean [0.2 0.5 0.8 1.1 1.5]")
    parser.add_argument("--out", default="out/mean_form", help="folder of the runs and of report.json")
    try:
        compare(*parser.parse_known_args(argv))
        return 0
    except (ipo.Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print("mean_form:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (ipo.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
