"""How do I bring my own pairs, whatever file or data set they are in?

  python -m lab.models.jsonl SOURCE                                  writes pairs.jsonl
  python -m lab.models.jsonl SOURCE --prompt question --out mine.jsonl

SOURCE is a file (JSONL, a JSON array, an object of columns, JSON over several lines, CSV, TSV, Parquet,
Arrow; UTF-8 or UTF-16; in gzip or zip, too), a folder (of files, or of save_to_disk), the address of a file,
or a data set's id on the hub: OWNER/NAME. Behind a data set or a folder :SPLIT may stand; else it is :train.

Keys of other names are given by --prompt, --chosen and --rejected. Two whole dialogues, as in Anthropic-HH,
are split behind the last "Assistant:" that they share. ShareGPT's messages, a single message, and a text
beside messages become lists of messages, which python -m lab.models.hf reads. A row that cannot be used is
left out, and counted with its reason. Keys that are not written are named.
Trap: nothing is guessed. A file with labels instead of pairs is KTO's, and is refused with what to do.
"""
import csv
import gzip
import io
import json
import os
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

import data
from data import Refused, short
from lab.common import start
from lab.models import chat

TURN = "\n\nAssistant:"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # ShareGPT's


# --------------------------------------------------------------------------------------- what a source holds

def load(source):
    """The rows. Raises what the readers raise."""
    if source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=60) as reply:
            return read_bytes(reply.read())
    if os.path.isfile(source):
        return read_bytes(Path(source).read_bytes())
    import datasets  # here, since it takes seconds
    datasets.disable_progress_bars()
    name, _, split = source.partition(":")
    saved = os.path.exists(f"{name}/dataset_dict.json") or os.path.exists(f"{name}/state.json")
    # streaming leaves no cache behind
    found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, streaming=True)
    splits = found if isinstance(found, dict) else {"train": found}
    split = split or "train"
    if split not in splits:
        raise Refused(f"no split {split!r} among {', '.join(sorted(splits))}; write {name}:{min(splits)}")
    return list(splits[split])


def read_bytes(raw):
    """The rows of a file's contents, which its first bytes tell apart. Raises what the readers raise."""
    if raw.startswith(b"\x1f\x8b"):
        return read_bytes(gzip.decompress(raw))
    if raw.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(io.BytesIO(raw))
        # no folders, and no __MACOSX/._NAME beside each NAME
        names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
        return sum((read_bytes(archive.read(name)) for name in names), [])
    if raw.startswith(b"PAR1"):
        import pyarrow.parquet  # here, since plain files need no package of lab's
        return pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    if raw.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        import pyarrow.ipc
        reader = pyarrow.ipc.open_file if raw.startswith(b"A") else pyarrow.ipc.open_stream
        return reader(raw).read_all().to_pylist()
    text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig").strip()
    if not text or "\0" in text or text.startswith("<"):
        raise ValueError("empty, a web page, or of a kind that this program does not know")
    if text.startswith(("{", "[")):
        return read_json(text)
    between = max(",\t;", key=text.partition("\n")[0].count)
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=between)
    data.no_key_twice([(name, "") for name in rows.fieldnames])
    return list(rows)


def read_json(text):
    """The rows of one value that holds them all, or of values behind each other, a line each or several."""
    decoder = json.JSONDecoder(object_pairs_hook=data.no_key_twice)
    rows, at = [], 0
    while at < len(text):
        row, at = decoder.raw_decode(text, at)
        rows.append(row)
        at = json.decoder.WHITESPACE.match(text, at).end()
    if len(rows) > 1:
        return rows
    if isinstance(rows[0], list):
        return rows[0]
    columns = rows[0].values()
    lists = all(isinstance(part, list) for part in columns)
    if lists and not any(isinstance(part[0], dict) for part in columns if part):
        sizes = [f"{name} {len(part)}" for name, part in rows[0].items()]
        if len({len(part) for part in columns}) > 1:
            raise Refused(f"its columns differ in their numbers of rows: {', '.join(sizes)}")
        return [dict(zip(rows[0], row)) for row in zip(*columns)]
    return rows  # an object, whose lists are messages


# ------------------------------------------------------------------------------------- from a row to a pair

def convert(row, names):
    """The object that ipo.py or lab.models.hf reads, of one row. Raises Refused with the reason."""
    if not isinstance(row, dict):
        raise Refused(f"no object; {data.NEEDED}")
    if None in row:  # where csv puts cells without a name
        raise Refused("more cells than the table's first line; quote texts that hold a delimiter")
    item = {key: row[name] for key, name in names.items() if row.get(name) is not None}
    if not {"chosen", "rejected"} <= item.keys():
        raise Refused(f"no {names['chosen']!r} or no {names['rejected']!r}; give both")
    if all(isinstance(item.get(key, ""), str) for key in chat.KEYS):
        if "prompt" not in item:
            item |= split_dialogues(item["chosen"], item["rejected"])
    else:
        item |= {key: as_messages(item[key], key) for key in chat.KEYS if key in item}
        chat.conversation(item, Counter())
    # str: of what JSON lacks, a date or a decimal number, say
    item = data.parse_json(json.dumps(item, default=str).encode())
    p = str(item.get("p"))
    if p.replace(".", "", 1).isdecimal():  # in a table numbers are texts
        item["p"] = float(p)
    data.parse_pair(item | dict.fromkeys(chat.KEYS, ""), Counter())  # of p
    return item


def split_dialogues(chosen, rejected):
    """Anthropic-HH's form, two whole dialogues: what both share, up to the last turn in it, is the prompt."""
    shared = os.path.commonprefix([chosen, rejected])
    if TURN not in shared:
        raise Refused("no prompt, nor a shared 'Assistant:'; give --prompt and the key that holds it")
    cut = shared.rfind(TURN) + len(TURN)
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def as_messages(value, key):
    """A list of messages with role and content, of ShareGPT's, of one message, or of a text."""
    if isinstance(value, str):
        return [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    found = []
    for message in value if isinstance(value, list) else [value]:
        if isinstance(message, dict) and "from" in message:
            who = message["from"]
            message = {"role": ROLES.get(str(who), who), "content": message.get("value")}
        found.append(message)
    return found


def names_of(rows, args):
    """Which key of the rows is the prompt, the chosen and the rejected response, and p. Raises Refused."""
    names = {key: getattr(args, key) for key in chat.KEYS} | {"p": "p"}
    keys = dict.fromkeys(str(key) for row in rows if isinstance(row, dict) for key in row if key)
    if "label" in keys and names["chosen"] not in keys:
        raise Refused(f"{args.source}: labels, not pairs; python -m lab.methods.kto --data takes JSONL of "
                      "them; by pandas: read_csv('FILE').to_json('new.jsonl', orient='records', lines=True), "
                      "or read_json")
    for key, name in names.items():
        if keys and name not in keys and name not in ("prompt", "p"):  # whole dialogues need no prompt
            raise Refused(f"{args.source}: no key {short(name)!r} among {short(', '.join(keys))!r}; give "
                          f"--{key} and the key that holds it; if one holds all rows, write that list alone")
    unused = sorted(keys.keys() - names.values())
    data.tell(args.source, Counter({f"keys are not written: {short(', '.join(unused))!r}": len(unused)}))
    return names


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("source", help="a file, a folder, an address or a data set's id")
    own.add_argument("--out", default="pairs.jsonl", help="the file to write, a new one [pairs.jsonl]")
    for key in chat.KEYS:
        own.add_argument(f"--{key}", default=key, help=f"the key that holds it [{key}]")
    args = own.parse_args(argv)
    if os.path.exists(args.out):
        raise Refused(f"--out {args.out} is there already; name another file, or remove it")
    try:
        rows = load(args.source)
    except ImportError:
        raise
    except Exception as error:  # what a dozen readers, datasets and its HTTP library raise
        raise Refused(f"{args.source}: cannot be read ({start.reason(error)}); mend it, or give another "
                      "file, a folder, an address, or a hub's OWNER/NAME, which needs a network") from None
    names = names_of(rows, args)
    items, reasons = [], Counter()
    for row in rows:
        try:
            items.append(convert(row, names))
        except Refused as error:
            reasons[str(error).replace(chat.CONVERT, "")] += 1
    for reason, count in reasons.most_common(10):
        print(f"  {count:,} left out: {reason}")
    if not items:
        why = max(reasons, key=reasons.get, default=f"no row at all; {data.NEEDED}")
        raise Refused(f"{args.source}: no row is a pair; of most: {why}")
    Path(f"{args.out}.tmp").write_text("".join(json.dumps(item) + "\n" for item in items))
    os.replace(f"{args.out}.tmp", args.out)  # whole, or not at all
    reader = "tokens" if type(items[0]["chosen"]) is str else "hf --init_from M"
    print(f"\n{len(rows):,} rows = {len(items):,} pairs in {data.one_line(args.out)} + {reasons.total():,} "
          f"left out. Now: python -m lab.models.{reader} --data {data.one_line(args.out)}")


if __name__ == "__main__":
    raise SystemExit(start.main("jsonl", run))
