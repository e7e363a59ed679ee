"""What do thumbs up and down look like to a trainer? Lines {"prompt", "response", "label": true or false}.

`Thumbs` holds such a file as ipo.FileSource holds pairs: rows of token ids, some to train on, some held out,
no prompt in both. SFT sees the liked rows. `make` takes a file of pairs, too (as an ipo.FileSource), and
`examples` gives the rows of either with their labels: of a pair one liked row and one that is not.
Traps: a label is true or false, not 1 or "yes"; a file of one kind teaches nothing; prompts are cut on the
left.
`python -m lab.thumbs --data FILE` counts the rows. Answer: polite_pairs.jsonl, seed 0: ROWS.
"""
import json
import sys

import torch

import data
import ipo
from lab import start as begin


def read(path):
    """Yields (prompt, response, label) of each line. Raises data.Refused."""
    for number, line in enumerate(open(path, "rb"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode("utf-8-sig"))
            json.dumps(item, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise data.Refused(f"{where}: no JSON in UTF-8 ({str(error)[:60]})") from None
        texts = isinstance(item, dict) and all(isinstance(item.get(k), str) for k in ("prompt", "response"))
        if not texts or not item["response"]:
            raise data.Refused(f'{where}: write {{"prompt": TEXT, "response": TEXT, "label": true or false}}')
        if not isinstance(item.get("label"), bool):
            raise data.Refused(f"{where}: 'label' is {str(item.get('label'))[:20]}; write true or false")
        yield item["prompt"], item["response"], item["label"]


class Thumbs:
    """Labelled rows of a file, with the members of ipo.FileSource that training needs."""

    def __init__(self, args):
        self.args, self.tokenizer = args, data.get_tokenizer(args.tokenizer)
        rows, label, prompts, numbers, long = [], [], [], {}, 0
        eot = [self.tokenizer.eot_token]
        for prompt, response, liked in read(args.data):
            prompt, response = map(self.tokenizer.encode_ordinary, (prompt, response))
            room = args.block_size - 1 - len(response)
            if room < 1:
                long += 1
                continue
            rows.append((prompt[-room:] or eot, response + eot))
            label.append(float(liked))
            prompts.append(numbers.setdefault(tuple(rows[-1][0]), len(numbers)))
        if not 0 < sum(label) < len(label):
            raise data.Refused(f"--data {args.data}: needs rows with label true and with false")
        self.pairs = data.PairData(rows, prompt=torch.tensor(prompts))
        self.label, self.sizes = torch.tensor(label), (args.block_size, self.tokenizer.n_vocab, 0)
        self.train, held = data.split(self.pairs, args.holdout, torch.Generator().manual_seed(args.seed))
        self.eval = held if len(held) else self.train
        print(f"data: {len(self.train):,} rows to train on, {len(held):,} held out; {long} too long, dropped")

    def sft_rows(self, n, generator):
        liked = self.train[self.label[self.train] == 1]
        return liked if len(liked) else self.train

    def pose(self, policy, ref_logp, generator):
        """Nothing to prepare: examples carry their labels."""


def make(args):
    """The source of a file of pairs or of labelled rows, told by its first line."""
    try:
        with open(args.data, "rb") as file:
            labelled = b'"response"' in file.readline()
    except OSError:
        labelled = False  # ipo.FileSource says what is wrong
    return Thumbs(args) if labelled else ipo.FileSource(args)


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
