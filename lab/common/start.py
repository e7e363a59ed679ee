"""How does a program of the lab begin and end? This is no program itself; programs import it.

`parser` and `parse` read a program's own flags beside those of ipo.py that mean something in it. `start`
makes policy, pairs and reference as ipo.run does before it trains, so that a program with the same flags
begins where `python ipo.py` begins. `fit` trains on any loss. `finish` says the answer, then its figures, a
`table` of Rows for instance, in Markdown, and writes OUT/report.json.
`main` turns what went wrong into one line and an exit status.
"""
import argparse
import json
import os
import re
import sys
import textwrap

import torch

import data
import ipo
import model

# of a RuntimeError if it is about memory; any other is a fault of ours
REMEDIES = {OSError: "name a file or folder that can be read and written, and has room",
            ImportError: "pip install -r lab/requirements.txt", RuntimeError: "take smaller sizes"}


def parser(doc, out=""):
    """A parser for a program's own flags; `parse` takes it. The first command in doc names the program.

    out: the default of --out, if the program knows no flags of ipo.py, which has one.
    """
    name = re.search(r"python -m (lab[.\w]+)", doc)[1]
    own = ipo.Parser(f"python -m {name}", description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    own.set_defaults(program=name)  # so the saved flags of a run say who made it
    if out:
        own.add_argument("--out", default=out, help=f"folder of report.json and pictures [{out}]")
    return own


def parse(own, argv, defaults="", without=(), world=False):
    """All flags: the program's own, and ipo.py's with these other defaults ("--tau 0.5 --steps 100").

    without: the flags of ipo.py that do nothing in this program. world: it needs the toy world, and no file;
    the world's tables are small and lie on the CPU. Raises Refused if something is given that does not fit.
    """
    useless = {*without, "sample", "temperature", "resume"}
    if world:
        useless |= {"data", "init_from", "tokenizer", "holdout", "block_size", "device", "dtype"}
        defaults = f"--device cpu {defaults}"
        own.add_argument("--data", default="bt", choices=data.WORLDS, help="a world has exact answers [bt]")
    useful = textwrap.fill(" ".join(f"--{name}" for name, *_ in ipo.ROWS if name not in useless), 100)
    own.epilog = f"flags of ipo.py that count, too:\n{useful}\nwith other defaults: {defaults or 'none'}"
    mine, rest = own.parse_known_args(argv)
    refuse_given(rest, useless, "does nothing in this program")
    args = ipo.parse([*defaults.split(), *rest])
    for name, value in vars(mine).items():
        if type(value) in (int, float) and not 0 <= value < 1e9:
            raise data.Refused(f"--{name} is {value}; it takes 0 to 1e9")
        setattr(args, name, value)
    return args


def start(args, world=ipo.WorldSource, file=ipo.FileSource):
    """-> (policy, source) after SFT, the pairs drawn and the reference in OUT/ref.pt. Raises Refused.

    world, file: which makes the source.
    """
    torch.manual_seed(args.seed)
    policy = None
    if args.init_from:
        policy, args.tokenizer = model.load(args.init_from)
        args.block_size = policy.config.block_size
    source = world(args) if args.data in data.WORLDS else file(args)
    ipo.refuse_what_cannot_run(source, args)
    args.tokenizer = source.tokenizer.name
    policy = policy or model.GPT(model.GPTConfig(*source.sizes, args.n_layer, args.n_head, args.n_embd))
    policy.to(args.device)
    ipo.make_reference(policy, source, args)
    return policy, source


def fit(policy, losses, args, evaluate):
    """Descends on each of `losses`, which are computed when they are asked for. Leaves ckpt.pt in --out.

    evaluate(policy) gives numbers by name for the log lines. Raises ipo.Stopped.
    """
    optimizer, log = ipo.adam(policy), []
    for step, loss in enumerate(losses, 1):
        loss.backward()
        ipo.optimizer_step(optimizer, step, args.steps, args.lr)
        if step % args.log_every == 0 or step == args.steps:
            numbers = {"batch loss": loss.item(), **evaluate(policy)}
            ipo.told(f"step {step}/{args.steps}", numbers)
            log.append({"step": step, **numbers})
            model.save(f"{args.out}/ckpt.pt", policy, args, step=step, log=log)


def changed(args, **flags):
    """A copy of args in which these flags have other values."""
    return argparse.Namespace(**vars(args) | flags)


def distance(name, world, other):
    """An `evaluate` for fit or ipo.train: {name: KL(pi||other)}, other (X,Y), log-probs."""
    return lambda policy: ipo.means({name: data.kl(world.table(policy), other)})


def make_folder(out):
    """Makes a folder for report.json and pictures. Raises Refused if it holds a run, whose report that is."""
    if os.path.exists(f"{out}/ref.pt"):
        raise data.Refused(f"--out {out} holds a run of another program; name another folder")
    os.makedirs(out, exist_ok=True)


def refuse_given(argv, names, why):
    """Raises Refused if one of these flags is in argv, --two-words or --two_words."""
    for word in argv:
        name = word.partition("=")[0].replace("-", "_")
        if name.startswith("__") and name[2:] in names:
            raise data.Refused(f"--{name[2:]} {why}; leave it out")


def refuse_twice(flag, values):
    """Raises Refused if a flag that takes several values was given one of them twice."""
    for value in values:
        if values.count(value) > 1:
            raise data.Refused(f"{flag}: {value} is given twice; give each value once")


def shown(value):
    """A figure as text, - for None. (The format's z: no -0.0000.)"""
    if isinstance(value, float):
        return f"{value:z.4f}"
    return "-" if value is None else str(value)


class Row(dict):
    """A row of a table, {column: number, text or None}. A column is as wide as its name, or 7 characters."""

    def __str__(self):
        cells = [shown(self[name]).rjust(max(len(name), 7)) for name in self]
        return f"| {' | '.join(cells)} |"


def table(first, rows):  # a name for the first column, {name: Row} -> figures for start.finish
    """The rows with their head, as Markdown."""
    columns = next(iter(rows.values()))
    return {first: Row(zip(columns, columns)), "---": Row.fromkeys(columns, "---:"), **rows}


def finish(args, answer, figures, **more):
    """Prints the answer, a sentence, and then the figures, {name: number or text}.

    OUT/report.json gets both, the flags, and more, which is not printed.
    """
    print(f"\n{answer}")
    for name, value in figures.items():
        label = f"| {name}" if isinstance(value, Row) else name
        print(f"  {label:24} {shown(value)}")
    report = {"flags": vars(args), "answer": answer, **figures, **more}
    with open(f"{args.out}/report.json", "w") as file:
        json.dump(report, file, indent=1, default=str)


def reason(error):
    """What an exception of somebody else's says, at most 150 characters. Of a KeyError that is a bare key."""
    text = " ".join(str(error).split())[:150] or type(error).__name__
    return f"no key {text}" if isinstance(error, KeyError) else text


def main(name, run, argv=None, threads=1):  # one, since the world's matrices are small
    """run(argv) -> the exit status.

    What cannot be used or had to stop is one line on stderr that begins with the program's name.
    """
    torch.set_num_threads(threads)
    # a terminal or pipe may lack a sample's characters, and progress is to be seen in a pipe, too
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    argv = sys.argv[1:] if argv is None else argv
    try:
        for word in argv:
            # argparse makes an empty list of --flag=--; of other bytes than UTF-8 Python makes surrogates
            if re.search(r"(?s)\A--.+=--\Z|[\ud800-\udfff]", word):
                raise data.Refused(f"{word}: -- and bytes that are no UTF-8 are no value; give another")
        run(argv)
        return 0
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stderr.close()
        return 0
    except (data.Refused, KeyboardInterrupt, *REMEDIES) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        why = str(error) or "interrupted"
        for kind, remedy in REMEDIES.items():
            if isinstance(error, kind):
                why = f"{reason(error)}; {remedy}"
        print(f"{name}: {data.one_line(why)}", file=sys.stderr)
        return 1 if isinstance(error, (ipo.Stopped, KeyboardInterrupt)) else 2
