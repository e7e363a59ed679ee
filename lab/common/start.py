"""Where do the methods of lab/ start? At the reference, with its pairs and its log-probs, as ipo.run does.

`start` does what stands in ipo.run before its training, draw by draw: whatever a program trains next has the
reference and the pairs of `python ipo.py` with the same flags. `parse` and `report` are a program's two ends:
ipo.py's flags beside its own, and its figures in OUT/report.json or one line on stderr.
`python -m lab.common.start --out OUT` leaves the reference in OUT/ref.pt: --init_from starts others from it.
Answer: in `bt`, seed 0, it wins .499 of its duels with uniform responses; pi* at tau .2 is .373 nats away.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch

import data
import ipo
import model


def flags(doc):
    """A parser of a program's own flags; what it does not know is ipo.py's."""
    return ipo.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                      allow_abbrev=False, epilog="The flags of python ipo.py --help count, too.")


def parse(parser, argv, world, file):
    """All flags, the parser's own and ipo.py's; `world` and `file`: flags that suit there. Raises Refused."""
    suited = world if ipo.parse(parser.parse_known_args(argv)[1]).data in data.WORLDS else file
    own, rest = parser.parse_known_args([*suited.split(), *argv])
    args = ipo.parse(rest)
    vars(args).update(vars(own))
    if args.resume or args.sample or args.logp == "mean":
        raise data.Refused("--resume, --sample and --logp mean have no place here; leave them out")
    for flag, value in vars(own).items():
        if type(value) in (int, float) and not 0 <= value < 1e9:
            raise data.Refused(f"--{flag} {value} is out of range; give a number from 0 to 1e9")
    return args


def start(args, file_source=ipo.FileSource):
    """-> policy after SFT, source with its pairs, reference log-probs of all rows, generator. As ipo.run."""
    torch.manual_seed(args.seed)
    generator, policy, saved = torch.Generator().manual_seed(args.seed), None, {}
    if args.init_from:
        policy, saved = model.load(args.init_from)
        args.block_size = policy.config.block_size
        args.tokenizer = saved.get("tokenizer", args.tokenizer)
    source = ipo.WorldSource(args) if args.data in data.WORLDS else file_source(args)
    if policy and (args.tokenizer != source.tokenizer.name or policy.config.vocab_size < source.sizes[1]):
        raise data.Refused(f"--init_from {args.init_from}: its model knows other words than {args.data}")
    policy = policy or model.GPT(model.GPTConfig(*source.sizes, args.n_layer, args.n_head, args.n_embd))
    policy.to(args.device)
    ipo.claim(args)
    args.tokenizer = source.tokenizer.name
    if args.device == "cpu" and sum(p.numel() for p in policy.parameters()) < 1e6:
        torch.set_num_threads(1)  # as in ipo.run
    if args.sft_steps:
        ipo.finetune(policy, source, args, generator)
    ref_logp = ipo.score(policy, source.pairs, torch.arange(len(source.pairs.prompt_len)), args)
    model.save(f"{args.out}/ref.pt", policy, tokenizer=args.tokenizer)
    source.pose(policy, ref_logp, generator)
    return policy, source, ref_logp, generator


def told(numbers):
    return ", ".join(f"{name} {ipo.show(value)}" for name, value in numbers.items())


def keep(policy, lines, step, batch, numbers, args):
    """Adds a line to metrics.jsonl, whose lines so far are `lines`, prints it and saves ckpt.pt."""
    lines.append({"step": step, "batch": batch, "eval": numbers})
    print(f"step {step:5d}/{args.steps} | {told(batch)} | {told(numbers)}", flush=True)
    model.save(f"{args.out}/ckpt.pt", policy, tokenizer=args.tokenizer, step=step)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(f"{args.out}/metrics.jsonl").write_text(text)


def report(name, run, argv):
    """run(argv) -> args, figures, which go to OUT/report.json; or one line on stderr. The exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as in ipo.main
    try:
        args, figures = run(argv)
        os.makedirs(args.out, exist_ok=True)
        Path(f"{args.out}/report.json").write_text(json.dumps(figures, indent=1))
        for key, value in figures.items():
            print(f"{key:12} {value if isinstance(value, str) else ipo.show(value):>10}")
        return 0
    except (data.Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print(f"{name}:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (data.Refused, model.Refused)) else 1


def run(argv):
    args = parse(flags(__doc__), argv, "--out out/start", "--out out/start")
    policy, source, _, _ = start(args)
    return args, source.evaluate(policy)


if __name__ == "__main__":
    sys.exit(report("start", run, sys.argv[1:]))
