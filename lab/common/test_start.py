"""Claims of lab/common/start.py, tried with a program that has a flag of its own."""
import json
import re
from pathlib import Path

import pytest

import data
import ipo
from lab.common import start

DOC = "What is this?\n\n  python -m lab.paper.tau --twice 2\n"


def parse(*argv, **more):
    own = start.parser(DOC)
    own.add_argument("--twice", type=float, default=1.0, help="a flag of its own [1]")
    return start.parse(own, argv, **more)


def test_own_flags_stand_beside_those_of_the_core():
    args = parse("--twice", "2", "--tau", "0.5")
    assert args.twice == 2.0
    assert args.tau == 0.5


def test_a_run_s_flags_name_its_program():
    assert parse().program == "lab.paper.tau"


def test_a_program_has_defaults_of_its_own():
    assert parse(defaults="--tau 0.7").tau == 0.7
    assert parse("--tau", "0.3", defaults="--tau 0.7").tau == 0.3


REFUSED = [
    (["--loss", "dpo"], {"without": ["loss"]}, "--loss does nothing in this program"),
    (["--loss=dpo"], {"without": ["loss"]}, "--loss does nothing in this program"),
    (["--resume"], {}, "--resume does nothing in this program"),
    (["--holdout", "0.1"], {"world": True}, "--holdout does nothing in this program"),
    (["--data", "pairs.jsonl"], {"world": True}, "invalid choice: 'pairs.jsonl'"),
    (["--twice", "-1"], {}, "--twice is -1.0; it takes 0 to 1e9"),
    (["--nope", "1"], {}, "--nope"),
]


@pytest.mark.parametrize("argv, more, why", REFUSED)
def test_what_does_not_fit_is_refused(argv, more, why):
    with pytest.raises(data.Refused, match=why):
        parse(*argv, **more)


def test_a_value_that_reads_like_a_flag_is_none():
    assert parse("--out", "sample").out == "sample"


def test_a_flag_may_be_written_with_hyphens():
    with pytest.raises(data.Refused, match="--block_size does nothing"):
        parse("--block-size", "9", world=True)


def test_help_lists_the_flags_that_count(capsys):
    with pytest.raises(SystemExit):
        parse("--help", without=["mu"])
    text = capsys.readouterr().out
    assert "--twice" in text and "--tau" in text
    assert "--mu" not in text and "--sample" not in text


def test_a_flag_s_values_are_given_once():
    with pytest.raises(data.Refused, match="--tau: 0.1 is given twice"):
        start.refuse_twice("--tau", [0.1, 0.2, 0.1])


def test_the_folder_of_a_run_is_left_alone(tmp_path):
    (tmp_path / "ref.pt").touch()
    with pytest.raises(data.Refused, match="name another folder"):
        start.make_folder(tmp_path)


def test_start_begins_where_ipo_run_begins(tmp_path):
    """The same reference, and its log-probs are those of the policy that comes back."""
    short = ["--sft_steps", "3", "--pairs", "100", "--steps", "2", "--batch_size", "8"]
    ipo.run(ipo.parse([*short, "--out", str(tmp_path / "core")]))
    _, source = start.start(parse(*short, "--out", str(tmp_path / "lab")))
    core = ipo.model.read(f"{tmp_path}/core/ref.pt")["ref_logp"]
    assert core.equal(source.pairs.ref_logp)


def test_finish_says_the_answer_before_the_figures(tmp_path, capsys):
    args = parse("--out", str(tmp_path))
    start.finish(args, "It is so.", {"distance": 0.25, "kind": "small", "far": None}, table=[1])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "It is so.",
        "  distance                 0.2500",
        "  kind                     small",
        "  far                      -",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["answer"] == "It is so."
    assert report["table"] == [1]


ENDS = [(data.Refused("no such thing"), 2), (ipo.Stopped("not finite"), 1),
        (OSError("disk full"), 2), (KeyboardInterrupt(), 1)]


@pytest.mark.parametrize("error, status", ENDS)
def test_what_went_wrong_is_one_line(error, status, capsys):
    def run(argv):
        raise error

    assert start.main("name", run, []) == status
    said = capsys.readouterr().err
    assert said.startswith("name: ") and said.count("\n") == 1


SAID = [
    (PermissionError(13, "Permission denied", "/x"), "'/x'; name a file or folder that can be read"),
    (OSError(36, "File name too long", 300 * "x"), "xxx; name a file or folder"),
    (ModuleNotFoundError("No module named 'trl'"), "'trl'; pip install -r lab/requirements.txt"),
    (RuntimeError("can't allocate memory"), "can't allocate memory; take smaller sizes"),
]


@pytest.mark.parametrize("error, words", SAID)
def test_an_error_of_the_system_has_a_remedy(error, words, capsys):
    def run(argv):
        raise error

    assert start.main("name", run, []) == 2
    line, = capsys.readouterr().err.splitlines()
    assert words in line
    assert len(line) < 250


def test_a_fault_of_ours_is_not_hidden():
    def run(argv):
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match="sizes differ"):
        start.main("name", run, [])


@pytest.mark.parametrize("word, shown", [("--twice=--", "--twice=--"), ("--out=\udc80", r"--out=\udc80")])
def test_what_is_no_value_reaches_no_program(word, shown, capsys):
    """Of --twice=-- argparse makes an empty list; \\udc80 is a byte that is no UTF-8."""
    assert start.main("name", parse, ["--tau", "1", word]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"name: {shown}: -- and bytes that are no UTF-8 are no value; give another")


@pytest.mark.parametrize("word", ["--", "a=--", "--out=a--", "--out=\u00e9"])
def test_other_words_do(word):
    assert start.main("name", lambda argv: None, [word]) == 0


REASONS = [
    (KeyError("model"), "no key 'model'"),
    (ValueError("one\n  two"), "one two"),
    (ValueError(), "ValueError"),
    (ValueError(200 * "x"), 150 * "x"),
]


@pytest.mark.parametrize("error, text", REASONS)
def test_the_reason_of_somebody_else_s_exception(error, text):
    assert start.reason(error) == text


LAB = Path(__file__).parent.parent
NAMED = r"python -m (lab[.\w]+\w)((?: [^\s`|#]+)*)"  # a program, and what follows it on its line
PAGES = sorted(LAB.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(LAB)))
def test_the_commands_of_a_page_name_programs_and_flags_that_exist(page):
    """A flag is one of ipo.py, or stands in the program. (trl_ipo takes TRL's.)"""
    known = {name for name, *_ in ipo.ROWS}
    for name, rest in re.findall(NAMED, page.read_text(encoding="utf-8")):
        path = LAB.parent / name.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if name != "lab.models.trl_ipo":
            text = file.read_text(encoding="utf-8")
            words = set(re.findall(r"\w+", text))
            flags = set(re.findall(r"--(\w+)", rest))
            assert flags <= known | words, name
