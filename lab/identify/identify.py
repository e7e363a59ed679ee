"""What does this loss optimise? Which IPO, if any, is yours?

  python -m lab.identify.identify module:function             or file.py:function
  python -m lab.identify.identify module:function --tokens    it takes log-probs of tokens, and masks
  python -m lab.identify.identify --trl --loss_type ipo       what the installed TRL's DPOTrainer computes

The function takes chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, or h, or h, p, tau, all
tensors (--tokens: lab/identify/tokens.py says which), and is asked for values. Is it a function of the margin h alone,
of sums or means over tokens? Where does a certain pair stop? Is it (h - 1/(2 tau))^2, eq. 17, for some tau,
or a known other loss? What is its link, argmin over h of p f(h) + (1-p) f(-h) (Tang et al. 2024,
arXiv:2402.05749), and so the Psi whose optimum it aims at? Is it convex, finite for |h| up to 1e4, are soft
labels honoured, and how far is its exact minimiser in a world from the nearest pi*? What fits nothing is
"none of these", with its numbers. `--tau NAME[=VALUE]` names the keyword that carries tau.

Traps: a mean over the batch hides the pairs, so each value comes from a batch of one; a loss without
reference looks like one of the margin until the reference moves.
Answer: (logits - 1/(2 beta))^2 on sums is IPO with tau = beta, largest difference 7e-13; TRL 1.16's ipo is
that of means over tokens; (beta h - 1/(2 beta))^2 asks for 50 nats at beta .1, where eq. 17 asks for 5.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

import ipo
from lab.identify import askable, tokens, verdict

UNITS = {  # what to add where h is of these
    "sum": "",
    "mean": "; but of MEANS over tokens, where eq. 17 has sums: if all lengths are L, that is tau / L",
}


def examine_tokens(loss, more, tau):
    """The same of a loss of token log-probs, and which sum or mean of them it takes."""
    kind, off = tokens.find(loss, more)
    fixture, slopes = tokens.fixture(loss, more)
    report = {"tokens": kind.name if kind else "neither", "fixture": fixture, "token_slopes": slopes}
    of_numbers = askable.Loss(tokens.OfNumbers(loss, more, kind or tokens.KINDS[0]), "", None)
    report |= verdict.examine(of_numbers, tau)
    if not kind:  # the numbers are of responses of one token, and name nothing
        report |= {"margin_only": False, "verdict": "none", "tau": None, "token_differences": off}
    return report, of_numbers


def sentence(report):
    """The verdict in words."""
    name, tau, asked = report["verdict"], report["tau"], report["asked_by_eq_17"]
    kind = report.get("tokens", "sum")
    start = "" if math.isfinite(report["value_at_0"]) else "not finite at h = 0, where training starts; "
    if kind == "neither":
        return start + "none of these: it takes neither sum nor mean over tokens (below, one-token responses)"
    if not report["margin_only"]:
        text = "no function of the margin alone: neither IPO nor DPO (no reference, lengths, or more terms)"
    elif name == "none":
        text = "none of these: neither IPO nor DPO, hinge, exponential, Savage"
    elif name.startswith("ipo"):
        text = f"this is IPO with tau = {tau:.4g}, times {report['factor']:.4g}: "
        text += f"it asks for {1 / (2 * tau):.4g} nats"
        text += f", eq. 17 at the tau named for {asked:.4g}" if asked else ""
    else:
        text = f"this is {name} with beta = {tau:.4g}, times {report['factor']:.4g}, not IPO: a certain pair "
        text += "never stops" if report["stops_at"] is None else f"stops at {report['stops_at']:.4g} nats"
    if report["sign"].startswith("wrong"):
        text += "; its sign is wrong: it pushes the chosen response down"
    return start + text + UNITS.get(kind, f"; h is no log-ratio of responses: it takes the {kind}")


def answers(args):
    """The report. Raises Unusable."""
    keyword, _, value = args.tau.partition("=")
    number = float(value) if value else None
    if args.trl:
        function = trl_loss(args.loss_type, keyword, number)
        report, loss = examine_tokens(function, {}, function.beta)
    else:
        function = askable.load(args.loss)
        tau = askable.tau_of(function, keyword, value)
        if args.tokens:
            tokens.check(function, keyword)
            report, loss = examine_tokens(function, {keyword: number} if value else {}, tau)
        else:
            loss = askable.Loss(function, keyword, number)
            report = verdict.examine(loss, tau)
    kind = report.get("tokens", "sum")
    if report["margin_only"] and kind in UNITS:
        mean = kind == "mean"
        report["nearest"] = {world: verdict.nearest(loss, world, mean) for world in ("bt", "deterministic")}
    return report


def trl_loss(loss_type, keyword, beta):
    """TRL's loss of token log-probs. Raises Unusable."""
    if keyword not in ("", "beta"):
        raise askable.Unusable(f"--tau {keyword}: TRL's tau is beta")
    try:
        from lab.identify import trl_loss as tool
    except ImportError as error:
        raise askable.Unusable(f"{error}: --trl needs pip install -r lab/requirements.txt") from None
    return tool.load(loss_type, beta)


def main(argv=None):
    """The command line. Exit status 0; 2, with one line on stderr, for what cannot be asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ipo.Parser(prog="identify", description=__doc__, formatter_class=raw)
    parser.add_argument("loss", nargs="?", default="", help="module:function or file.py:function")
    parser.add_argument("--tokens", action="store_true", help="it takes token log-probs and masks")
    parser.add_argument("--trl", action="store_true", help="ask the installed TRL's DPOTrainer instead")
    parser.add_argument("--loss_type", default="ipo", help="TRL's name of the loss [ipo]")
    parser.add_argument("--tau", default="", help="NAME or NAME=VALUE of the keyword that carries tau")
    parser.add_argument("--seed", type=int, default=0, help="of the log-probs that test for the margin [0]")
    parser.add_argument("--out", default="out/identify", help="folder of report.json [out/identify]")
    parser.add_argument("--json", action="store_true", help="print one object instead of the screen")
    try:
        args = parser.parse_args(argv)
        torch.manual_seed(args.seed)
        report = answers(args)
    except (ValueError, RuntimeError) as error:
        print(f"identify: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    first = sentence(report)
    report = plain(report)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}/report.json").write_text(json.dumps(report, indent=1))
    if args.json:
        print(json.dumps(report))
    else:
        print(first)
        for name, answer in report.items():
            print(f"{name:20} {answer}")
    return 0


def plain(answer):
    """None for the numbers that JSON has not, also inside."""
    if isinstance(answer, dict):
        return {name: plain(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [plain(value) for value in answer]
    return None if isinstance(answer, float) and not math.isfinite(answer) else answer


if __name__ == "__main__":
    sys.exit(main())
