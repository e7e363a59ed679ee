"""How do I bring my own pairs, whatever file or data set they are in?

  python -m lab.models.jsonl SOURCE                                  writes pairs.jsonl
  python -m lab.models.jsonl SOURCE --prompt question --out mine.jsonl

SOURCE is a file (JSONL, a JSON array, an object of columns, JSON over several lines, CSV, TSV, Parquet,
Arrow; UTF-8 or UTF-16; in gzip or zip, too), a folder (of files, or of save_to_disk), the address of a file,
or a data set's id on the hub (OWNER/NAME, or OWNER/NAME:CONFIG).

Other keys are named by --prompt, --chosen and --rejected. Two whole dialogues, as in Anthropic-HH, are split
behind the last "Assistant:" that they share. ShareGPT's messages, a single message, and a text prompt before
messages become lists of messages, which python -m lab.models.hf reads. A row that cannot be used is left
out, and counted with its reason.
Trap: nothing is guessed. A file with labels instead of pairs is KTO's, and is refused.
"""
import csv
import gzip
import io
import json
import os
import re
import sys
import urllib.request
import zipfile
from collections import Counter

import data
from data import Refused, short
from lab.common import start
from lab.models import chat

TURN = "\n\nAssistant:"
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
PROMPTS = ("question", "instruction", "query", "input", "conversations", "messages")  # other names of the key
SPACE = re.compile(r"\s*")


# --------------------------------------------------------------------------------------- what a source holds

def load(source, split):
    """(what it is, its rows). Raises what the readers raise."""
    address = source.startswith(("http://", "https://"))
    if split and (address or os.path.isfile(source)):
        raise ValueError("--split does nothing for a file; leave it out")
    if address:
        with urllib.request.urlopen(source, timeout=60) as reply:
            return read_bytes(reply.read())
    if os.path.isfile(source):
        with open(source, "rb") as file:
            return read_bytes(file.read())
    split = split or "train"
    import datasets  # here, since it takes seconds
    datasets.disable_progress_bars()
    if os.path.exists(f"{source}/dataset_dict.json") or os.path.exists(f"{source}/state.json"):
        found = datasets.load_from_disk(source)
        return "a folder of save_to_disk", list(found[split] if isinstance(found, dict) else found)
    name, _, config = source.partition(":")
    # streaming leaves no cache behind
    found = datasets.load_dataset(name, config or None, split=split, streaming=True)
    return f"a data set, split {split}", list(found)


def read_bytes(raw):
    """(what it is, rows) of a file's contents. Raises what the readers raise."""
    if raw.startswith(b"\x1f\x8b"):
        kind, rows = read_bytes(gzip.decompress(raw))
        return f"gzip, {kind}", rows
    if raw.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(io.BytesIO(raw))
        parts = [read_bytes(archive.read(name)) for name in archive.namelist() if not name.endswith("/")]
        return f"zip, {parts[0][0]}", [row for _, rows in parts for row in rows]
    if raw.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return read_arrow(raw)
    text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    if not text.strip() or "\0" in text or text.lstrip().startswith("<"):
        raise ValueError("empty, a web page, or of a kind that this program does not know")
    if text.lstrip().startswith(("{", "[")):
        return read_json(text)
    head = text.partition("\n")[0]
    between = max(",\t;", key=head.count)
    csv.field_size_limit(2**31 - 1)
    return "a table in text", list(csv.DictReader(io.StringIO(text, newline=""), delimiter=between))


def read_arrow(raw):
    import pyarrow
    import pyarrow.parquet
    if raw.startswith(b"PAR1"):
        return "Parquet", pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    opened = pyarrow.ipc.open_file(raw) if raw.startswith(b"ARROW1") else pyarrow.ipc.open_stream(raw)
    return "Arrow", opened.read_all().to_pylist()


def read_json(text):  # -> what it is, rows; a row that is no JSON is an exception
    """One value that holds all rows, or values behind each other, a line each or several."""
    decoder = json.JSONDecoder(object_pairs_hook=data.no_key_twice)
    values = []
    at = SPACE.match(text).end()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            value = error if isinstance(error, Refused) else Refused("no JSON")
            at += len(text[at:].partition("\n")[0])
        values.append(value)
        at = SPACE.match(text, at).end()
    rows = values[0]
    if len(values) > 1 or isinstance(rows, Refused):
        return "JSON objects", values
    if isinstance(rows, list):
        return "a JSON array", rows
    columns = [list(part.values()) if isinstance(part, dict) else part for part in rows.values()]
    cells = [cell for part in columns if isinstance(part, list) for cell in part]
    # a list of messages is a cell, and no column
    if all(isinstance(part, list) for part in columns) and not any(isinstance(cell, dict) for cell in cells):
        return "an object of columns", [dict(zip(rows, row)) for row in zip(*columns)]
    return "a JSON object", [rows]


# ------------------------------------------------------------------------------------- from a row to a pair

def convert(row, names):
    """The object that ipo.py or lab.models.hf reads, of one row. Raises Refused with the reason."""
    if not isinstance(row, dict):
        raise row if isinstance(row, Refused) else Refused("no object")
    item = {key: row[name] for key, name in names.items() if row.get(name) is not None}
    for key in ("chosen", "rejected"):
        if key not in item:
            raise Refused(f"no {names[key]!r}")
    if all(isinstance(value, str) for value in item.values()):
        if "prompt" not in item:
            item |= split_dialogues(item["chosen"], item["rejected"])
    else:
        item = {key: as_messages(value, key) for key, value in item.items()}
        chat.conversation(dict(item))
    if row.get("p") is not None:
        item["p"] = row["p"]
    checked = data.parse_json(json.dumps(item).encode())
    data.parse_pair({**checked, "prompt": "", "chosen": "", "rejected": ""}, Counter())  # of p
    return item


def split_dialogues(chosen, rejected):
    """Anthropic-HH's form, two whole dialogues: what both share, up to the last turn in it, is the prompt."""
    shared = os.path.commonprefix([chosen, rejected])
    if TURN not in shared:
        raise Refused("no 'prompt', and no 'Assistant:' in what chosen and rejected share")
    cut = shared.rfind(TURN) + len(TURN)
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def as_messages(value, key):
    """A list of messages with role and content, of ShareGPT's, of one message, or of a text."""
    if isinstance(value, str):
        return [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    found = []
    for message in value if isinstance(value, list) else [value]:
        if isinstance(message, dict) and "from" in message:
            role = message["from"]
            message = {"role": ROLES.get(role, role), "content": message.get("value")}
        found.append(message)
    return found


def names_of(keys, args):
    """Which key of the rows is the prompt, the chosen and the rejected response. Raises Refused."""
    names = {key: getattr(args, key) or key for key in chat.KEYS}
    if "label" in keys and names["chosen"] not in keys:
        raise Refused(f"{args.source}: labels of single responses, not pairs; python -m lab.methods.kto "
                      "--data takes them")
    others = [name for name in PROMPTS if name in keys]
    if names["prompt"] not in keys and not args.prompt and len(others) == 1:
        names["prompt"] = others[0]
        print(f"{others[0]!r} is taken for the prompt")
    for key, name in names.items():
        # whole dialogues need no prompt
        if keys and name not in keys and (key != "prompt" or args.prompt or others):
            raise Refused(f"{args.source}: no key {short(name)!r} among {short(', '.join(keys))!r}; give "
                          f"--{key} and the key that holds it")
    return names


def tell(text):
    """Prints a line. A key or a name from outside may hold a terminal's codes, which Refused escapes."""
    print(Refused(text))


def parse(argv):
    """The flags. Raises Refused."""
    own = start.parser(__doc__)
    own.add_argument("source", help="a file, a folder, an address or a data set's id")
    own.add_argument("--out", default="pairs.jsonl", help="the file to write, a new one [pairs.jsonl]")
    for key in chat.KEYS:
        own.add_argument(f"--{key}", help=f"the key that holds it [{key}]")
    own.add_argument("--split", help="of a data set [train]")
    args = own.parse_args(argv)
    if os.path.exists(args.out):
        raise Refused(f"--out {args.out} is there already; name another file, or remove it")
    return args


def run(argv):
    args = parse(argv)
    try:
        kind, rows = load(args.source, args.split)
    except Exception as error:  # what a dozen readers, datasets and its HTTP library raise
        raise Refused(f"{args.source}: cannot be read ({short(error) or type(error).__name__}); give a file, "
                      "a folder, an address, or a hub's OWNER/NAME, which needs a network") from None
    keys = dict.fromkeys(str(key) for row in rows if isinstance(row, dict) for key in row)
    tell(f"{kind}, {len(rows):,} rows with the keys {short(', '.join(keys))}")
    names = names_of(keys, args)
    items, reasons = [], Counter()
    for row in rows:
        try:
            items.append(convert(row, names))
        except Refused as error:
            reasons[str(error)] += 1
    for reason, count in reasons.most_common(10):
        print(f"  {count:,} left out: {reason}")
    if not items:
        raise Refused(f"{args.source}: no row is a pair, as told above; {data.NEEDED}")
    with open(args.out, "x", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    lists = any(not isinstance(item["chosen"], str) for item in items)
    program = "python -m lab.models.hf --init_from MODEL" if lists else "python ipo.py"
    print()
    tell(f"{len(rows):,} rows = {len(items):,} pairs in {args.out} + {sum(reasons.values()):,} left out. "
         f"Now train: {program} --data {args.out}")


if __name__ == "__main__":
    sys.exit(start.main("jsonl", run))
