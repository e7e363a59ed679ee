"""What does this loss optimise? Which IPO, if any, is yours?

  python -m lab.identify ipo:dpo_loss --tau tau=0.1   a function that Python can import, or file.py:function
  python -m lab.identify mine.py:loss --tau beta      ... whose argument beta carries tau and has a default
  python -m lab.identify mine.py:loss --tokens        ... that takes log-probs of tokens, and masks
  python -m lab.identify --trl --loss_type ipo        what the installed TRL's DPOTrainer computes

The function takes chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, or h, or h and p, all
tensors. With --tokens it takes log-probs (B,T) of chosen, rejected and the reference's of both, then the
masks of chosen and rejected, 1 at the response's tokens. It is asked for values, and nothing is guessed. What
fits nothing is "none of these", with its numbers. The first line is the answer.

Trap: a loss without a reference looks like one of the margin until the reference moves, so it is moved here.
"""
import functools
import math

from data import Refused
from lab.common import start
from lab.identify import margin, tokens

MEANS = ". But it is of MEANS over tokens, where eq. 17 has sums. If all lengths are L, that is tau / L"
UNITS = {"sum": "", "mean": MEANS}  # what to add where h is of these
WORDS = {"None": "-", "True": "yes", "False": "no", "nan": "-"}


def run(argv=None):
    own = start.parser(__doc__)
    own.add_argument("loss", nargs="?", default="", help="module:function or file.py:function")
    own.add_argument("--tau", default="", help="NAME or NAME=VALUE of the argument that carries tau")
    own.add_argument("--tokens", action="store_true", help="it takes token log-probs and masks")
    own.add_argument("--trl", action="store_true", help="ask the installed TRL's DPOTrainer instead")
    own.add_argument("--loss_type", help="with --trl, TRL's name of the loss [ipo]")
    report = examined(own.parse_args(argv))
    print(sentence(report))
    for name, value in report.items():
        number = f"{value:.6g}" if isinstance(value, float) else value
        print(f"  {name:23} {WORDS.get(str(value), number)}")


def examined(args):
    """What is found of the loss that the flags name, by name. Raises Refused."""
    if args.trl and (args.loss or args.tokens) or args.loss_type and not args.trl:
        raise Refused("--loss_type does nothing without --trl, which takes no other loss and no --tokens")
    if args.trl:
        return of_tokens(*with_tau(tokens.of_trl(args.loss_type or "ipo"), args.tau or "beta"))
    function, tau = with_tau(margin.load(args.loss), args.tau)
    if args.tokens:
        return of_tokens(function, tau)
    return {"over tokens": "sum", **margin.examine(margin.Loss(function), tau)}


def with_tau(function, text):
    """The function with the argument of --tau NAME[=VALUE] at this value, or its default; and that number."""
    if not text:
        return function, None
    name, _, value = text.partition("=")
    arguments = margin.parameters(function)
    if name not in arguments:
        raise Refused(f"--tau {text}: write NAME=VALUE; the loss's arguments are {', '.join(arguments)}")
    try:
        number = float(value or arguments[name].default)
    except (TypeError, ValueError):
        raise Refused(f"--tau {text}: that gives it no number; write --tau {name}=0.1") from None
    return functools.partial(function, **{name: number}), number


def of_tokens(function, tau):
    """The same of a loss of token log-probs: of the loss of the numbers that it makes of rows."""
    names = margin.needed(function)
    if len(names) != 6:
        raise Refused(f"--tokens needs six arguments, see --help; its own are ({', '.join(names)})")
    kind, off = tokens.find(function)
    report = margin.examine(margin.Loss(tokens.of_numbers(function, kind)), tau)
    report["over tokens"] = kind.name
    if off > tokens.FITS:  # the numbers are of responses of one token, and name nothing
        report |= {"over tokens": "neither", "margin alone": False, "verdict": "none", "tau": None}
    return report


def sentence(report):
    """The verdict in words."""
    name, tau, kind = report["verdict"], report["tau"], report["over tokens"]
    begin = "" if math.isfinite(report["value at h = 0"]) else "not finite at h = 0, where training starts; "
    if kind == "neither":
        return f"{begin}none of these: it takes neither sum nor mean over tokens"
    if not report["margin alone"]:
        text = "no function of the margin alone: neither IPO nor DPO (no reference, lengths, or more terms)"
    elif name == "none":
        text = "none of these: neither IPO nor DPO, hinge, squared hinge"
    elif name.startswith("ipo"):
        asked, due = 1 / (2 * tau), report["eq. 17 asks for"]
        text = f"this is IPO with tau = {tau:.4g}, times {report['factor']:.4g}: it asks for {asked:.4g} nats"
        text += f", eq. 17 at the tau named for {due:.4g}" if due else ""
    else:
        text = f"this is {name} with beta = {tau:.4g}, times {report['factor']:.4g}, not IPO: a certain pair "
        text += "never stops" if math.isnan(report["stops at"]) else f"stops at {report['stops at']:.4g} nats"
    if report["slope at h = 0"] > 0:
        text += "; its sign is wrong, since it pushes the chosen response down"
    return begin + text + UNITS.get(kind, f"; h is no log-ratio of responses: it takes the {kind}")


if __name__ == "__main__":
    raise SystemExit(start.main("identify", run))
