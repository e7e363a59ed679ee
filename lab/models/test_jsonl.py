"""Claims of lab/models/jsonl.py: what people bring becomes JSONL that the core or lab.models.hf reads.
"""
import decimal
import gzip
import http.server
import io
import json
import sys
import threading
import zipfile
from collections import Counter

import datasets
import pytest

import data
from lab.common import start
from lab.models import chat, jsonl

ROWS = [{"prompt": f"Say {i}:", "chosen": f" yes {i}\n\u4f60", "rejected": f" no, \"{i}\""} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No"}


def convert(tmp_path, source, *flags):
    """The exit status; the file is tmp_path/made.jsonl."""
    argv = [str(source), "--out", str(tmp_path / "made.jsonl"), *flags]
    return start.main("jsonl", jsonl.run, argv)


def made(tmp_path):
    """The objects that were written."""
    return [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]


def table(delimiter):
    """The rows as a table in text."""
    import csv
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROWS[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zipped(*names):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name, content in names:
            archive.writestr(name, content)
    return raw.getvalue()


def parquet():
    raw = io.BytesIO()
    datasets.Dataset.from_list(ROWS).to_parquet(raw)
    return raw.getvalue()


def arrow(kind):
    """kind: "file" or "stream"."""
    import pyarrow
    raw, rows = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    make = {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}[kind]
    with make(raw, rows.schema) as writer:
        writer.write_table(rows)
    return raw.getvalue()


FILES = {
    "lines": LINES.encode(),
    "UTF-16": LINES.encode("utf-16"),
    "with a mark": b"\xef\xbb\xbf" + LINES.encode(),
    "array": json.dumps(ROWS).encode(),
    "array over lines": json.dumps(ROWS, indent=1).encode(),
    "columns": json.dumps(COLUMNS).encode(),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "gzip": gzip.compress(LINES.encode()),
    "gzip of an array": gzip.compress(json.dumps(ROWS).encode()),
    "zip": zipped(("d/", ""), ("d/a.json", json.dumps(ROWS[:2])),
                  ("d/b.jsonl", json.dumps(ROWS[2]))),
    "CSV": table(","),
    "TSV": table("\t"),
    "Parquet": parquet(),
    "Arrow file": arrow("file"),
    "Arrow stream": arrow("stream"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_any_kind_becomes_its_pairs(tmp_path, kind, capsys):
    """Every text as it was, with its line breaks, quotes and letters; the last line says what to do next."""
    source = tmp_path / "source"
    source.write_bytes(FILES[kind])
    assert convert(tmp_path, source) == 0
    assert made(tmp_path) == ROWS
    assert [pair[:3] for pair in data.read_jsonl(str(tmp_path / "made.jsonl"))] == [
        tuple(row.values()) for row in ROWS]
    last = capsys.readouterr().out.splitlines()[-1]
    path = tmp_path / "made.jsonl"
    assert last == (f"3 rows = 3 pairs in {path} + 0 left out. "
                    f"Now: python -m lab.models.tokens --data {path}")


def test_a_folder_of_save_to_disk(tmp_path):
    """One data set, or several by name."""
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "two")
    for source, expected in {"one": ROWS, "two": ROWS, "two:test": ROWS[:1]}.items():
        assert convert(tmp_path, f"{tmp_path}/{source}") == 0
        assert made(tmp_path) == expected
        (tmp_path / "made.jsonl").unlink()


SPLITS = [
    ("saved:nope", "no split 'nope' among test, validation; write "),
    ("saved", "no split 'train' among test, validation; write "),
    ("files:nope", "no split 'nope' among test, validation; write "),
    ("files", "no split 'train' among test, validation; write "),
]


@pytest.mark.parametrize("source, words", SPLITS)
def test_the_advice_on_a_split_can_be_followed(source, words, tmp_path, monkeypatch, capsys):
    """Of a folder of save_to_disk and one of files, without a split named train."""
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"test": rows, "validation": rows}).save_to_disk("saved")
    (tmp_path / "files").mkdir()
    for name in "test", "validation":
        (tmp_path / f"files/{name}.jsonl").write_text(LINES)
    assert convert(tmp_path, source) == 2
    line, = capsys.readouterr().err.splitlines()
    assert words in line
    advice = line.partition("; write ")[2].partition(")")[0]
    assert advice == source.partition(":")[0] + ":test"
    assert convert(tmp_path, advice) == 0
    assert made(tmp_path) == ROWS


def test_a_folder_of_files(tmp_path, monkeypatch):
    """:SPLIT takes the files of that name; no copy is left in a cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "files/test.jsonl").write_text(json.dumps(ROWS[1]))
    assert convert(tmp_path, f"{tmp_path}/files:test") == 0
    assert made(tmp_path) == ROWS[1:2]
    assert not list((tmp_path / "cache").glob("**/*.arrow"))


def test_an_address(tmp_path, capsys):
    """Of a file; a web page is none."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(LINES.encode() if self.path == "/pairs" else b"<html>")

        def log_message(self, *words):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert convert(tmp_path, f"{address}/page") == 2
    assert "a web page" in capsys.readouterr().err
    assert convert(tmp_path, f"{address}/pairs") == 0
    assert made(tmp_path) == ROWS
    server.shutdown()


def test_whole_dialogues_are_split_at_the_last_turn_that_they_share(tmp_path):
    """Anthropic-HH's form."""
    shared = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:"
    source = tmp_path / "hh.jsonl"
    source.write_text(json.dumps({"chosen": shared + " So.", "rejected": shared + " So what."}))
    assert convert(tmp_path, source) == 0
    assert made(tmp_path) == [{"prompt": shared, "chosen": " So.", "rejected": " So what."}]


def test_keys_are_renamed(tmp_path):
    """By flags; p is kept, what is not used is not written."""
    source = tmp_path / "keys.jsonl"
    source.write_text(json.dumps({"question": "Q", "good": "a", "bad": "b", "p": 0.75, "id": 7}))
    assert convert(tmp_path, source, "--prompt", "question", "--chosen", "good", "--rejected", "bad") == 0
    assert made(tmp_path) == [{"prompt": "Q", "chosen": "a", "rejected": "b", "p": 0.75}]


@pytest.mark.parametrize("chosen, rejected, words", [
    ("a", "b", "give --prompt and the key that holds it"),
    ([YES], [NO], "chosen and rejected need messages, the same in both")])
def test_a_prompt_of_another_name_is_not_guessed(tmp_path, chosen, rejected, words, capsys):
    """The flag that is asked for works."""
    source = tmp_path / "other.jsonl"
    source.write_text(json.dumps({"question": "Q", "chosen": chosen, "rejected": rejected}))
    assert convert(tmp_path, source) == 2
    assert words in capsys.readouterr().out
    assert convert(tmp_path, source, "--prompt", "question") == 0
    assert "Q" in str(made(tmp_path)[0]["prompt"])


CONVERSATIONS = [
    {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
    {"prompt": "Hi", "chosen": YES, "rejected": NO},
    {"prompt": [USER], "chosen": "Yes.", "rejected": "No"},
    {"prompt": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes."},
     "rejected": {"from": "gpt", "value": "No"}}]


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_messages_become_lists_of_messages(tmp_path, row):
    """ShareGPT's, one message, texts beside lists: all as lab.models.hf reads them."""
    source = tmp_path / "talk.jsonl"
    source.write_text(json.dumps(row))
    assert convert(tmp_path, source) == 0
    item, = made(tmp_path)
    assert chat.conversation(item, Counter()) == ([USER], "Yes.", "No")


def test_a_text_prompt_beside_whole_conversations_is_one_of_their_messages(tmp_path):
    """They hold it."""
    source = tmp_path / "talk.jsonl"
    source.write_text(json.dumps({"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]}))
    assert convert(tmp_path, source) == 0
    item, = made(tmp_path)
    assert chat.conversation(item, Counter()) == ([USER], "Yes.", "No")


def test_rows_that_cannot_be_used_are_counted(tmp_path, capsys):
    """Each with its reason; the sum is right."""
    bad = ['{"prompt": "a", "chosen": null, "rejected": "b"}', "5",
           '{"prompt": "a", "chosen": "b", "rejected": "c", "p": 3}',
           '{"prompt": "a", "chosen": 5, "rejected": 6}',
           '{"chosen": "\\ud83d", "prompt": "", "rejected": ""}']
    source = tmp_path / "mixed.jsonl"
    source.write_text(LINES + "\n".join(bad))
    assert convert(tmp_path, source) == 0
    said = capsys.readouterr().out
    for reason in ("no 'chosen' or no 'rejected'", "no object", "'p' is 3", "'chosen' is [5], not messages",
                   "no JSON in UTF-8"):
        assert f"1 left out: {reason}" in said
    assert f"8 rows = 3 pairs in {tmp_path / 'made.jsonl'} + 5 left out" in said
    assert made(tmp_path) == ROWS


WRONG = {
    "": "empty, a web page",
    "\n \n": "empty, a web page",
    "<html>": "a web page",
    "a,b\n1,2\n": "no key 'chosen' among 'a, b'; give --chosen",
    '{"data": [{"chosen": "a"}]}': "if one holds all rows, write that list alone",
    "[]": 'no row is a pair; of most: no row at all; write {"prompt"',
    "[1, 2]": 'no row is a pair; of most: no object; write {"prompt"',
    "{}": 'no row is a pair; of most: no row at all; write {"prompt"',
    LINES + '{"prompt": "a", "chosen": "b"': "cannot be read (Expecting ',' delimiter: line 4",
    '{"prompt": "a", "chosen": "b", "chosen": "c"}': "a key stands there twice",
    '{"prompt": "a", "completion": "b", "label": true}': "python -m lab.methods.kto --data takes JSONL",
    '{"chosen": "a", "rejected": "b"}': "no row is a pair",
    "\x00\x01": "of a kind that this program does not know",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_pairs_is_a_line(tmp_path, text, capsys):
    """And no file is written."""
    source = tmp_path / "source"
    source.write_text(text)
    assert convert(tmp_path, source) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("jsonl: ")
    assert WRONG[text] in line
    assert not (tmp_path / "made.jsonl").exists()


@pytest.mark.parametrize("source", ["nobody/nothing", "none.jsonl", "http://127.0.0.1:1/x", "", "a:b:c"])
def test_what_is_not_there_is_a_line(tmp_path, source, capsys):
    """A hub id or an address without a network, too."""
    assert convert(tmp_path, source) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "cannot be read" in line


def test_a_package_that_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    (tmp_path / "source").write_bytes(FILES["Parquet"])
    assert convert(tmp_path, tmp_path / "source") == 2
    line, = capsys.readouterr().err.splitlines()
    assert "pyarrow" in line
    assert line.endswith("; pip install -r lab/requirements.txt")


TABLES = {
    "prompt,chosen,rejected\na, b, c, d\n": "more cells than the table's first line",
    "prompt,chosen,chosen,rejected\na,b,x,c\n": "a key stands there twice among 'prompt, chosen",
    json.dumps({"prompt": ["a", "b"], "chosen": ["c"], "rejected": ["d", "e"]}):
        "its columns differ in their numbers of rows: prompt 2, chosen 1, rejected 2",
}


@pytest.mark.parametrize("text", TABLES)
def test_no_cell_of_a_table_is_lost_in_silence(tmp_path, text, capsys):
    """An unquoted comma, a name twice, columns of several lengths."""
    (tmp_path / "table").write_text(text)
    assert convert(tmp_path, tmp_path / "table") == 2
    assert TABLES[text] in capsys.readouterr().err


def test_a_table_may_have_a_probability(tmp_path):
    (tmp_path / "table.csv").write_text("prompt,chosen,rejected,p\na,b,c,0.75\n")
    assert convert(tmp_path, tmp_path / "table.csv") == 0
    assert made(tmp_path)[0]["p"] == 0.75


def test_keys_that_are_not_written_are_named(tmp_path, capsys):
    (tmp_path / "source").write_text(json.dumps(ROWS[0] | {"score": 3, "id": 7}))
    assert convert(tmp_path, tmp_path / "source") == 0
    assert "2 keys are not written: 'id, score'" in capsys.readouterr().out


def test_a_zip_file_of_macos(tmp_path):
    """It holds a second file for each."""
    source = tmp_path / "mac.zip"
    source.write_bytes(zipped(("a.jsonl", LINES), ("__MACOSX/._a.jsonl", b"\0\5\x16\7")))
    assert convert(tmp_path, source) == 0
    assert made(tmp_path) == ROWS


def test_values_that_json_lacks(tmp_path, capsys):
    """Of a Parquet file: bytes are no text, a decimal number is a probability."""
    rows = [{"prompt": "a", "chosen": b"b", "rejected": b"c", "p": decimal.Decimal("0.5")},
            {"prompt": "a", "chosen": None, "rejected": b"c", "p": decimal.Decimal("0.5")}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bytes")
    assert convert(tmp_path, tmp_path / "bytes") == 2
    assert "not messages" in capsys.readouterr().err
    rows = [row | {"chosen": "b", "rejected": "c"} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "decimal")
    assert convert(tmp_path, tmp_path / "decimal") == 0
    assert made(tmp_path)[0]["p"] == 0.5


@pytest.mark.parametrize("sender", [["x"], {}, 5, None])
def test_a_sender_that_is_no_text_is_refused(tmp_path, sender, capsys):
    row = CONVERSATIONS[4] | {"prompt": [{"from": sender, "value": "Hi"}]}
    (tmp_path / "source").write_text(json.dumps(row))
    assert convert(tmp_path, tmp_path / "source") == 2
    assert "'prompt' is [{" in capsys.readouterr().err


def test_the_last_line_says_what_is_wrong_with_most_rows(tmp_path, capsys):
    """And does not send its user to this program."""
    bad = [{"chosen": 5}, {"chosen": None}, {"rejected": None}]
    bad = [ROWS[0] | wrong for wrong in bad]
    (tmp_path / "source").write_text(json.dumps(bad))
    assert convert(tmp_path, tmp_path / "source") == 2
    out, err = capsys.readouterr()
    assert "no row is a pair; of most: no 'chosen' or no 'rejected'" in err
    assert "1 left out: 'chosen' is [5], not messages" in out
    assert "lab.models.jsonl" not in out


def test_the_advice_on_sharegpt_can_be_followed(tmp_path, capsys):
    """Its prompt has another key."""
    row = dict(CONVERSATIONS[4])
    row["conversations"] = row.pop("prompt")
    (tmp_path / "source").write_text(json.dumps(row))
    assert convert(tmp_path, tmp_path / "source") == 2
    assert "python -m lab.models.jsonl FILE --prompt KEY" in capsys.readouterr().err
    with pytest.raises(data.Refused, match="lab.models.jsonl makes JSONL of it .with --prompt KEY"):
        chat.conversation(row, Counter())  # what lab.models.hf says
    assert convert(tmp_path, tmp_path / "source", "--prompt", "conversations") == 0
    item, = made(tmp_path)
    assert chat.conversation(item, Counter()) == ([USER], "Yes.", "No")


def test_the_advice_on_labels_can_be_followed(tmp_path, capsys):
    """A table becomes lines that KTO reads."""
    pandas = pytest.importorskip("pandas")
    (tmp_path / "table.csv").write_text("prompt,completion,label\na,b,true\nc,d,false\n")
    assert convert(tmp_path, tmp_path / "table.csv") == 2
    advice = "read_csv('FILE').to_json('new.jsonl', orient='records', lines=True)"
    assert advice in capsys.readouterr().err
    table = pandas.read_csv(tmp_path / "table.csv")
    table.to_json(tmp_path / "new.jsonl", orient="records", lines=True)
    first = (tmp_path / "new.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"prompt": "a", "completion": "b", "label": True}


def test_a_name_with_a_line_break_makes_no_second_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").write_text(LINES)
    assert start.main("jsonl", jsonl.run, ["source", "--out", "a\nb\x1b[31m"]) == 0
    assert "pairs in a\\nb\\x1b[31m + 0 left out" in capsys.readouterr().out


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch, capsys):
    def full(path, text):
        with open(path, "w") as file:
            file.write(text[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl.Path, "write_text", full)
    (tmp_path / "source").write_bytes(FILES["CSV"])
    assert convert(tmp_path, tmp_path / "source") == 2
    line, = capsys.readouterr().err.splitlines()
    assert "No space left on device; name a file or folder" in line
    assert not (tmp_path / "made.jsonl").exists()


def test_a_file_is_not_replaced(tmp_path, capsys):
    """Refused before anything is read."""
    (tmp_path / "made.jsonl").write_text("mine")
    assert convert(tmp_path, tmp_path / "none") == 2
    assert "made.jsonl is there already; name another file" in capsys.readouterr().err
    assert (tmp_path / "made.jsonl").read_text() == "mine"


def test_a_key_cannot_write_to_the_terminal(tmp_path, capsys):
    """Its codes are shown, not sent."""
    (tmp_path / "source").write_text(json.dumps({"\x1b[31m": 1}))
    assert convert(tmp_path, tmp_path / "source") == 2
    assert "\x1b" not in capsys.readouterr().err


# each piece of advice of data.py, followed once
ADVICE = {
    "gzip, not JSONL": FILES["gzip"],
    "a zip archive, not JSONL": FILES["zip"],
    "Parquet, not JSONL": FILES["Parquet"],
    "Arrow, not JSONL": FILES["Arrow stream"],
    "UTF-16, not JSONL": FILES["UTF-16"],
    "a JSON array, not JSONL": FILES["array"],
    "JSON over several lines, not JSONL": FILES["objects over lines"],
    "(of a CSV or TSV table, perhaps), not JSONL": FILES["CSV"],
    "'prompt' is [\"Say 0:\", \"Say 1:\", \"Say 2:\"], not a text": FILES["columns"],
    "'prompt' is not among its keys (chosen,":
        b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}',
}


@pytest.mark.parametrize("words", ADVICE)
def test_the_advice_of_the_core_can_be_followed(tmp_path, words):
    """It refuses the file and names this program; the core reads what this program makes of it."""
    source = tmp_path / "source"
    source.write_bytes(ADVICE[words])
    with pytest.raises(data.Refused) as error:
        data.read_jsonl(str(source))
    assert words in str(error.value)
    assert "python -m lab.models.jsonl makes JSONL of it" in str(error.value)
    assert convert(tmp_path, source) == 0
    assert data.read_jsonl(str(tmp_path / "made.jsonl"))


def test_the_advice_on_a_folder_can_be_followed(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.raises(data.Refused, match="a folder; .* python -m lab.models.jsonl"):
        data.read_jsonl(str(tmp_path / "saved"))
    assert convert(tmp_path, tmp_path / "saved") == 0
    assert data.read_jsonl(str(tmp_path / "made.jsonl"))


def test_lists_of_messages_are_sent_to_the_program_that_reads_them(tmp_path, capsys):
    source, out = tmp_path / "one.jsonl", tmp_path / "pairs.jsonl"
    message = {"role": "assistant", "content": "Yes."}
    row = {"prompt": "Hi", "chosen": message, "rejected": message | {"content": "No"}}
    source.write_text(json.dumps(row))
    jsonl.run([str(source), "--out", str(out)])
    assert f"Now: python -m lab.models.hf --init_from M --data {out}" in capsys.readouterr().out
