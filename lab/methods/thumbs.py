"""What do thumbs up and down look like to a trainer? Lines {"prompt", "response", "label": true or false}.

`Thumbs` holds such a file as ipo.FileSource holds pairs: rows of token ids, some to train on, some held out,
no prompt in both. SFT sees the liked rows. `make` takes a file of pairs, too (as an ipo.FileSource), and
`examples` gives the rows of either with their labels: of a pair one row that is liked and one that is not.
Traps: a label is true or false, not 1 or "yes"; rows of one kind alone teach nothing; prompts are cut on
the left to fit, responses never.
`python -m lab.methods.thumbs --data FILE` counts the rows.
Answer: a file of 1,100 pairs of answers gave 1,962 rows to train on, half liked, and 113 pairs held out.
"""
import json
import sys

import torch

import data
import ipo
from lab.common import start as begin


def parse_line(line, where):
    """(prompt, response, label) of one line (bytes). Raises data.Refused."""
    try:
        item = json.loads(line.decode("utf-8-sig"))
        json.dumps(item, ensure_ascii=False).encode()  # as in data.parse_line
    except (ValueError, RecursionError) as error:
        raise data.Refused(f"{where}: no JSON in UTF-8 ({str(error)[:60]})") from None
    texts = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("prompt", "response"))
    if not texts:
        raise data.Refused(f'{where}: write {{"prompt": TEXT, "response": TEXT, "label": true or false}}')
    if not item["response"]:
        raise data.Refused(f"{where}: 'response' is empty: no token to score; fill it or remove the line")
    if not isinstance(item.get("label"), bool):
        raise data.Refused(f"{where}: 'label' is {str(item.get('label'))[:20]!r}; write true or false")
    return item["prompt"], item["response"], item["label"]


def read(path):
    """Yields (prompt, response, label) of each line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse_line(line, f"{path}:{number}")


class Thumbs:
    """Labelled rows of a file, with the members of ipo.FileSource that training needs."""

    def __init__(self, args):
        self.args, self.tokenizer = args, data.get_tokenizer(args.tokenizer)
        self.sizes = args.block_size, self.tokenizer.n_vocab, 0
        rows, label, prompts, numbers, long = [], [], [], {}, 0
        eot = [self.tokenizer.eot_token]
        for prompt, response, liked in read(args.data):
            prompt = self.tokenizer.encode_ordinary(prompt)
            response = self.tokenizer.encode_ordinary(response)
            room = args.block_size - 1 - len(response)
            if room < 1:
                long += 1
                continue
            prompt = prompt[-room:] or eot
            rows.append((prompt, response + eot))
            label.append(float(liked))
            prompts.append(numbers.setdefault(tuple(prompt), len(numbers)))
        self.two_kinds(label, f"too long: {long}; see --block_size")
        self.pairs = data.PairData(rows, prompt=torch.tensor(prompts))
        self.label = torch.tensor(label)
        self.train, held = data.split(self.pairs, args.holdout, torch.Generator().manual_seed(args.seed))
        self.two_kinds(self.label[self.train].tolist(), f"held out: {len(held)}; see --holdout and --seed")
        self.eval = held if len(held) else self.train
        print(f"data: {len(self.train):,} rows to train on, {len(held):,} held out; {long} too long, dropped")

    def two_kinds(self, label, missing):
        if not 0 < sum(label) < len(label):
            raise data.Refused(f"--data {self.args.data}: needs rows with label true and with false; "
                               f"{sum(label):.0f} of {len(label)} are true ({missing})")

    def sft_rows(self, n, generator):
        return self.train[self.label[self.train] == 1]

    def pose(self, policy, ref_logp, generator):
        """Nothing to prepare: examples carry their labels."""


def labelled(path):
    """Is the first line such a row, not a pair? What is wrong with a file its reader says, not this."""
    try:
        with open(path, "rb") as file:
            first = next(filter(bytes.strip, file), b"{}")
        item = json.loads(first.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(item, dict) and "chosen" not in item and ("response" in item or "label" in item)


def make(args):
    """The source of a file of labelled rows or of pairs."""
    return Thumbs(args) if labelled(args.data) else ipo.FileSource(args)


def examples(source, which):  # -> rows (N,), labels (N,) in 0..1
    """Of source.train or source.eval."""
    if isinstance(source, Thumbs):
        return which, source.label[which]
    p = source.pairs.p[which]
    return source.pairs.pair_rows(which), torch.cat([p, 1 - p])


def run(argv):
    args = begin.parse(begin.flags(__doc__), argv, "", "--out out/thumbs")
    if args.data in data.WORLDS:
        raise data.Refused(f"--data {args.data}: name a JSONL file")
    source = make(args)
    rows, label = examples(source, source.train)
    return args, {"rows": len(rows), "liked": label.mean().item(), "held out": len(source.eval)}


if __name__ == "__main__":
    sys.exit(begin.report("thumbs", run, sys.argv[1:]))
