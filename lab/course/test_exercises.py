"""The course: right answers are solved, typical wrong ones get their hint, questions name what exists.
"""
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import data
import ipo
from lab.common import start
from lab.course import __main__ as course
from lab.course import exercises

HERE = Path(ipo.__file__).parent
QUESTIONS = course.questions()


def flat(q):  # question 7
    beyond = ((q - 0.5).abs() - 0.1).clamp(min=0)
    return torch.sign(q - 0.5) * beyond / 0.8


def of_hard_labels(psi, p, tau):  # question 6
    certain = psi(torch.ones(1)) - psi(torch.zeros(1))
    return (p - 0.5) * certain / tau


def squared_hinge(h, p, tau):
    preferred = (1 - tau * h).clamp(min=0)
    opposite = (1 + tau * h).clamp(min=0)
    return p * preferred ** 2 + (1 - p) * opposite ** 2


def savage(h, p, tau):
    preferred = (-tau * h).sigmoid()
    opposite = (tau * h).sigmoid()
    return p * preferred ** 2 + (1 - p) * opposite ** 2


def exponential(h, p, tau):
    preferred = torch.exp(-tau * h)
    opposite = torch.exp(tau * h)
    return p * preferred + (1 - p) * opposite


def fixed(ref, p, tau):  # question 15
    pi = ref
    for _ in range(3000):
        answer = (ref.log() + p @ pi / tau).softmax(-1)
        pi = (0.9 * pi.log() + 0.1 * answer.log()).softmax(-1)
    return pi


def constant(value):
    return lambda *_: value


def majority(q):  # question 5
    return (torch.sign(q - 0.5) + 1) / 2


def figure_1(tau):  # question 10
    wins = exercises.exact([2.5, 1.5, 0.5])
    return (wins / 3 / tau).softmax(0)


CYCLE = [
    [0.5, 1.0, 0.49],
    [0.0, 0.5, 0.51],
    [0.51, 0.49, 0.5],
]
OTHER_CYCLE = [
    [0.5, 1, 0.45],
    [0, 0.5, 0.6],
    [0.55, 0.4, 0.5],
]
NO_PREFERENCES = [
    [0, 1, 0.4],
    [0, 0, 1],
    [0.6, 0, 0],
]
NO_CYCLE = [
    [0.5, 1, 1],
    [0, 0.5, 1],
    [0, 0, 0.5],
]
NO_FAVOURITE = [
    [0.5, 1, 0],
    [0, 0.5, 1],
    [1, 0, 0.5],
]
RIGHT = [
    (1, lambda p, tau: ((p - 0.5) / tau) ** 2),
    (1, lambda p, tau: ipo.ipo_loss(torch.zeros(1), p, tau)),
    (2, constant((2, 4, 3))),
    (2, constant(torch.tensor([2, 4, 3.1]))),
    (3, lambda tau: torch.sigmoid(10 * tau)),
    (3, lambda tau: 1 / (1 + math.exp(-10 * tau))),
    (4, lambda q: q + q**4 - 2 * q**3 + q**2),
    (4, lambda q: q + 0.5 * (q - 0.5).abs() + 7),
    (5, majority),
    (5, lambda q: (q > 0.5) + 0.5 * (q == 0.5)),
    (6, of_hard_labels),
    (7, flat),
    (7, lambda q: (flat(q) + 3).float()),
    (8, constant(CYCLE)),
    (8, constant(OTHER_CYCLE)),
    (9, lambda tau, L: tau * L),
    (9, lambda tau, L: float(tau) * float(L)),
    (10, figure_1),
    (10, lambda tau: tuple(figure_1(tau))),
    (11, constant((squared_hinge, lambda q: q * 2 - 1))),
    (11, constant((savage, torch.logit))),
    (11, constant([exponential, lambda q: torch.logit(q) / 2])),
    (12, constant(torch.logit)),
    (12, constant(lambda q: 3 * torch.log(q / (1 - q)) + 1)),
    (14, lambda tau: (math.log(9) / tau, math.log(1999) / tau)),
    (14, lambda tau: [torch.logit(torch.tensor(0.9)) / tau, 7.6004 / tau]),
    (15, fixed),
    (15, lambda *case: fixed(*case).tolist()),
]
WRONG = [  # and a piece of the hint
    (1, lambda p, tau: 1 / (4 * tau**2), "this p"),
    (1, lambda p, tau: (2 * p - 1) / (2 * tau), "before any update"),
    (1, constant("0"), "numbers of shape"),
    (2, constant((4, 4, 3)), "the first"),
    (2, constant((2, 2, 3)), "the second"),
    (2, constant((2, 4, 4)), "the third"),
    (2, constant((2, 4)), "numbers of shape [3]"),
    (3, lambda tau: torch.sigmoid(20 * tau), "logit(1-p)"),
    (4, lambda q: q * q, "quadratic"),
    (4, lambda q: 2 * q, "by psi = q for"),
    (4, lambda q: q + 3, "affine"),
    (4, lambda q: -q, "falls"),
    (4, lambda q: q + torch.rand_like(q) * 1e-7, "on chance"),
    (5, lambda q: (q > 0.5).double(), "a tie"),
    (5, lambda q: torch.tensor(0.5), "the shape that it gets"),
    (5, lambda q: q / q, "not a number"),
    (6, lambda psi, p, tau: (psi(p) - psi(1 - p)) / (2 * tau),
     "weight 1 - p"),
    (6, lambda psi, p, tau: (2 * p - 1) / (2 * tau), "weight 1 - p"),
    (7, lambda q: 2 * flat(q), "where must it be flat"),
    (7, lambda q: q**3, "where must it be flat"),
    (8, constant(NO_PREFERENCES), "for every pair"),
    (8, constant(NO_CYCLE), "above 1/2"),
    (8, constant(NO_FAVOURITE), "What may a lose by"),
    (9, lambda tau, L: tau / L, "between which sums"),
    (9, lambda tau, L: tau, "between which sums"),
    (10, lambda tau: torch.softmax(torch.tensor([1, 0.5, 0]) / tau, 0),
     "all of them"),
    (10, constant([1, 0, 0]), "all of them"),
    (11, constant((ipo.ipo_loss, lambda q: q)), "one sum"),
    (11, constant((ipo.dpo_loss, torch.logit)), "one sum"),
    (11, constant((squared_hinge, torch.logit)),
     "slope of the loss zero"),
    (11, constant((lambda h, p, tau: -savage(h, p, tau), torch.logit)),
     "raise h"),
    (11, constant((lambda h, p, tau: savage(h, p / p, tau), torch.logit)),
     "-h and 1 - p"),
    (11, constant((lambda h, p, tau: exponential(99 * h, p, tau), torch.logit)),
     "overflows"),
    (12, constant(lambda q: q), "moves by"),
    (12, constant(lambda q: 0 * q), "asks for nothing"),
    (13, constant([4, "test_order"]), "a dict"),
    (14, lambda tau: (math.log(9) / tau, math.log(999) / tau),
     "two terms"),
    (14, lambda tau: (math.log(9), math.log(1999)), "two terms"),
    (15, exercises.optimum, "uniform mu"),
    (15, lambda ref, p, tau: fixed(ref, p.T, tau), "not your pi"),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_a_right_answer_is_solved(number, answer):
    """In several forms."""
    assert exercises.grade(number, answer) == ("solved", "")


@pytest.mark.parametrize("number, answer, piece", WRONG)
def test_a_typical_wrong_answer_gets_its_hint(number, answer, piece):
    """In one line, without a name of Python's."""
    state, hint = exercises.grade(number, answer)
    assert state == "wrong"
    assert piece in hint and "\n" not in hint and "Error" not in hint


def test_every_hint_is_reached():
    """Each hint of the page is that of a wrong answer above, but those that need a core of their own."""
    reached = [exercises.grade(number, answer)[1] for number, answer, _ in WRONG]
    for number in QUESTIONS:
        for name, text in exercises.hints(number).items():
            beginning = text.partition("{")[0]
            known = [hint for hint in reached if hint.startswith(beginning)]
            assert known or name in ("clean", "passes"), (number, name)


@pytest.mark.parametrize("number", [n for n in QUESTIONS if n not in exercises.SHARED])
def test_an_answer_that_raises_is_one_line(number):
    """The kind of the error, and where."""
    def answer(*_):
        raise KeyError("no\nline")
    state, hint = exercises.grade(number, answer)
    assert state == "wrong"
    assert "KeyError" in hint and "line " in hint and "\n" not in hint


def test_as_delivered_everything_is_open(monkeypatch, capsys):
    """The list has a line for each question."""
    monkeypatch.setattr(ipo, "psi", exercises.identity)
    assert start.main("course", course.run, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(QUESTIONS) == 15
    assert all(line.endswith("open") for line in lines)


def test_one_psi_answers_one_question(monkeypatch):
    """What is right for question 5 is no wrong answer to 4 and 7."""
    monkeypatch.setattr(ipo, "psi", majority)
    states = {number: exercises.state(number)[0] for number in exercises.SHARED}
    assert states == {4: "open", 5: "solved", 7: "open"}


def test_a_psi_that_answers_none_is_wrong(monkeypatch):
    monkeypatch.setattr(ipo, "psi", torch.square)
    assert {exercises.state(number)[0] for number in exercises.SHARED} == {"wrong"}


def test_a_psi_is_kept_under_its_number(monkeypatch):
    """psi_5 stays an answer when psi goes on to question 7."""
    monkeypatch.setattr(ipo, "psi", torch.square)
    monkeypatch.setattr(ipo, "psi_5", majority, raising=False)
    assert exercises.state(5)[0] == "solved"
    assert exercises.state(7)[0] == "wrong"


def test_checks_see_the_psi_of_the_paper(monkeypatch):
    """Whatever stands in ipo.py, and it stands there afterwards, too."""
    monkeypatch.setattr(ipo, "psi", torch.sign)
    assert exercises.grade(1, lambda p, tau: ipo.ipo_loss(torch.zeros(1), p, tau))[0] == "solved"
    assert ipo.psi is torch.sign


def test_the_answer_that_stands_there_is_looked_at(monkeypatch, capsys):
    """After the question comes its place, and the hint."""
    monkeypatch.setattr(exercises, "answer_9", lambda tau, L: tau)
    assert start.main("course", course.run, ["9"]) == 0
    assert capsys.readouterr().out.startswith("lab/course/exercises.py, answer_9: wrong. Hint: ")


@pytest.mark.parametrize("given", ["0", "16", "seven"])
def test_a_question_that_is_none_is_refused(given, capsys):
    assert start.main("course", course.run, [given]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def a_copy(folder, name, line, becomes):
    """The folder becomes a copy of core and course where a line of this file is another."""
    copied = [HERE / core for core in ("model.py", "data.py", "ipo.py")]
    copied += [path for path in (HERE / "lab").glob("co*/*") if path.is_file()]
    for path in copied:
        copy = folder / path.relative_to(HERE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    edited = folder / name
    edited.write_text(edited.read_text().replace(line, becomes, 1))


@pytest.fixture
def in_a_copy(tmp_path, capsys):
    """`python -m lab.course NUMBER` in such a copy, in this process, as importing torch takes a second."""
    def run(number, name="ipo.py", line="", becomes=""):
        a_copy(tmp_path, name, line, becomes)
        path = [str(tmp_path), *(place for place in sys.path if Path(place).resolve() != HERE)]
        argv = mock.patch.object(sys, "argv", ["course", str(number)])
        with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", path), argv:
            for module in [*sys.modules]:
                if module.partition(".")[0] in ("ipo", "data", "model", "lab"):
                    del sys.modules[module]
            with pytest.raises(SystemExit) as end:
                runpy.run_module("lab.course", run_name="__main__")
        return SimpleNamespace(status=end.value.code, stdout=capsys.readouterr().out)

    return run


def test_a_psi_half_typed_is_one_line(tmp_path):
    """The question comes all the same. In a process of its own."""
    a_copy(tmp_path, "ipo.py", "    return q\n", "    return q q\n")
    command = [sys.executable, "-m", "lab.course", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("7. A Psi to order")
    assert done.stderr.count("\n") == 1 and "ipo.py, line" in done.stderr


def test_an_answer_half_typed_is_one_line(in_a_copy):
    """With the file and the line. (The text that it exits with is what Python writes to stderr.)"""
    answer = "lab/course/exercises.py"
    done = in_a_copy(1, answer, "return None  # open", "return p p")
    assert done.stdout.startswith("1. The loss at step 0")
    assert "exercises.py, line" in done.status and "\n" not in done.status


def test_an_answer_in_place_of_its_line_is_solved(in_a_copy):
    """Between the banners of exercises.py."""
    answer = "lab/course/exercises.py"
    done = in_a_copy(1, answer, "return None  # open", "return ((p - 0.5) / tau) ** 2")
    assert done.stdout.endswith("lab/course/exercises.py, answer_1: solved\n")


def test_answers_stand_between_the_banners():
    """One for each question that psi does not answer, in their order, and nothing else."""
    text = Path(exercises.__file__).read_text()
    _, between, _ = re.split("^# =+ .*YOUR ANSWERS.* =+$", text, flags=re.M)
    found = re.findall(r"^\S+ answer_(\d+)", between, re.M)
    due = [str(number) for number in QUESTIONS if number not in exercises.SHARED]
    assert found == due
    assert between.count("    return None  # open\n") == len(due)


def test_a_question_hides_its_hints(in_a_copy):
    """And it ends with the state of the answer."""
    done = in_a_copy(7)
    assert done.status == 0
    assert done.stdout.endswith("ipo.py, psi: open\n")
    assert "where must it be flat" not in done.stdout


def test_the_readme_quotes_the_list(quoted):
    """As it is while no question is answered."""
    due = [f"{number:3} {minutes:>4} min  {title:34} open"
           for number, (title, minutes, _) in course.questions().items()]
    assert quoted["python -m lab.course"] == due


def test_programs_that_questions_name_exist():
    """python -m lab.ROOM.NAME is a file, or lab.ROOM a room."""
    for page in ("EXERCISES.md", "README.md", "TEACHING.md"):
        text = (HERE / "lab/course" / page).read_text()
        for name in re.findall(r"python -m (lab[.\w]+\w)", text):
            path = HERE / name.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
    assert "EXERCISE: another mu" in (HERE / "ipo.py").read_text()


def test_silent_bugs_stand_in_the_core():
    """Each line stands in its file once, and the file still compiles with the bug."""
    assert len(exercises.bugs()) == 8
    for name, line, becomes in exercises.bugs():
        text = (HERE / name).read_text()
        assert text.count(line) == 1, line
        compile(text.replace(line, becomes), name, "exec")


@pytest.fixture
def small_core(tmp_path, monkeypatch):
    """A core of one line, with a test that sees bug 4, one that sees nothing, one that always fails.

    Beside it there is a folder, as in every checkout.
    """
    (tmp_path / ".github").mkdir()
    (tmp_path / "ipo.py").write_text("def margin(chosen, rejected):\n    return chosen - rejected\n")
    (tmp_path / "test_ipo.py").write_text(
        "import ipo\ndef test_order():\n    assert ipo.margin(3, 1) == 2\n"
        "def test_blind():\n    pass\ndef test_red():\n    assert 0\n")
    monkeypatch.setattr(ipo, "__file__", str(tmp_path / "ipo.py"))


@pytest.mark.parametrize("named, state, piece", [
    ({4: "test_order"}, "solved", ""),
    ({4: "test_blind"}, "wrong", "test_blind passes"),
    ({4: "test_red"}, "wrong", "fails without the bug"),
    ({4: "test_absent"}, "wrong", "not in test_ipo.py"),
    ({9: "test_order"}, "wrong", "numbers from 1"),
    ({}, "wrong", "a dict")])
def test_question_13_runs_tests_on_copies(small_core, named, state, piece):
    found = exercises.grade(13, constant(named))
    assert found[0] == state and piece in found[1]


def program(number):
    """The program that a question shows."""
    text = QUESTIONS[number][2].split("<<END\n")[1].split("    END")[0]
    return re.sub("^    ", "", text, flags=re.M)


SMALL = '"--steps", "6", "--sft_steps", "3", "--pairs", "500", "--batch_size", "20", "--log_every", "3"'


def test_the_run_of_question_11_works(tmp_path, monkeypatch, capsys):
    """In small, with a right answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exercises, "answer_11", constant((savage, torch.logit)))
    monkeypatch.setattr(ipo, "LOSSES", dict(ipo.LOSSES))
    monkeypatch.setattr(ipo, "PSI_OF", dict(ipo.PSI_OF))
    exec(program(11).replace("ipo.parse([", f"ipo.parse([{SMALL}, "), {})
    assert "step 6/6" in capsys.readouterr().out


def test_the_kl_of_question_2_is_the_worlds():
    """From tau .2 to .1 KL(pi*||ref) grows by what the check takes."""
    world = data.World("bt")
    ref = (world.base + 1e-9).log().expand_as(world.reward)
    mu = torch.full_like(ref, 1 / ref.shape[1])
    far = data.optimum(ref, world.pstar, mu, 0.1)
    near = data.optimum(ref, world.pstar, mu, 0.2)
    grows = data.kl(far, ref) / data.kl(near, ref)
    assert 2.85 < grows < 3.15
