"""The checks of lab/course/exercises.py: right answers in several forms, wrong ones, and answers of odd kinds.
"""
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import ipo
from lab.course import exercises

HERE = Path(ipo.__file__).parent


def optimum(ref, score):
    return (ref.log() + score).softmax(-1)


def fixed(ref, p, tau, step=0.1):
    pi = ref
    for _ in range(3000):
        pi = (pi.log() * (1 - step) + step * (ref.log() + p @ pi / tau)).softmax(-1)
    return pi


def mean_form(ref, g, length, tau):
    low, high = -200.0, 200.0
    for _ in range(200):
        c = (low + high) / 2
        pi = ref * (length * (g / tau + c)).exp()
        low, high = (low, c) if pi.sum() > 1 else (c, high)
    return pi


def minimiser(loss, n):
    """The distribution over n responses of least loss(log pi): by descent, in float64."""
    theta = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(theta.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().softmax(-1)


def flat(q):  # exercise 7
    return torch.sign(q - 0.5) * ((q - 0.5).abs() - 0.1).clamp(min=0) / 0.8


def squared_hinge(h, p, tau):
    return p * (1 - tau * h).clamp(min=0) ** 2 + (1 - p) * (1 + tau * h).clamp(min=0) ** 2


def savage(h, p, tau):
    return p * (-tau * h).sigmoid() ** 2 + (1 - p) * (tau * h).sigmoid() ** 2


def exponential(h, p, tau):
    return p * torch.exp(-tau * h) + (1 - p) * torch.exp(tau * h)


def hinge(h, p, tau):
    return p * (1 - tau * h).clamp(min=0) + (1 - p) * (1 + tau * h).clamp(min=0)


def dpo_at(k, scale=1.0, more=0.0):
    return lambda h, p, tau: scale * ipo.dpo_loss(h, p, k * tau) + more


def ipo_times(c):
    return lambda h, p, tau: c * (h - (2 * p - 1) / (2 * tau)) ** 2


def online(draws="policy", label="hard", late=False, who=None):
    """Answers to exercise 17, right by default."""
    def answer(source, policy, ref_logp, args):
        X, Y = source.reward.shape
        once = source.enumerate(policy).exp()
        while True:
            now = source.enumerate(policy).exp()
            pi = {"policy": now, "apart": now, "once": once}.get(draws, torch.full((X, Y), 1 / Y))
            x = torch.arange(args.batch_size) % X
            y, lost = torch.multinomial(pi[x], 2, replacement=True).T
            if draws == "half":  # the other response is from mu
                y = torch.multinomial(now[x], 1)[:, 0]
            while draws == "apart" and (y == lost).any():  # equals are drawn again
                y, lost = torch.where(y == lost, torch.multinomial(pi[x], 2, replacement=True).T, torch.stack([y, lost]))
            p = source.pstar[x, y, lost]
            if label == "hard":
                wins = torch.rand(len(p)) < p
                y, lost = torch.where(wins, y, lost), torch.where(wins, lost, y)
                p = torch.ones(len(p))
            if label == "none":
                p = torch.ones(len(p))
            if label == "swapped":
                p = 1 - p
            rows = torch.cat([x * Y + y, x * Y + lost])
            tokens, mask = source.pairs.padded(rows)
            if who == "ref":
                yield data.Batch(tokens, mask, p.float()), ref_logp[rows].roll(1)
            elif who == "mask":
                yield data.Batch(tokens, torch.ones_like(mask), p.float()), ref_logp[rows]
            elif who == "bare":
                yield tokens, mask, p
            else:
                yield data.Batch(tokens, mask, p.float()), ref_logp[rows]
    return answer


def answer_raises(*_):
    raise KeyError("no")


def stops(*_):
    sys.exit("bye")


def constant(value):
    return lambda *_: value


P = [[0.5, 1.0, 0.49], [0.0, 0.5, 0.51], [0.51, 0.49, 0.5]]
RIGHT = {
    1: [lambda tau: 1 / (4 * tau**2), lambda tau: (0.5 / float(tau)) ** 2,
        lambda tau: ipo.ipo_loss(torch.zeros(1), torch.ones(1), tau)],
    2: [constant((2, 4, 3)), constant([2.0, 4.0, 3.0]), constant(torch.tensor([2, 4, 3.1]))],
    3: [lambda tau: torch.sigmoid(10 * tau), lambda tau: 1 / (1 + math.exp(-10 * tau)),
        lambda tau: torch.sigmoid(torch.tensor([10 * float(tau)]))],
    4: [lambda q: q + q**4 - 2 * q**3 + q**2, lambda q: q + 0.1 * torch.cos(2 * math.pi * q),
        lambda q: q + 0.5 * (q - 0.5).abs() + 7],
    5: [lambda q: (torch.sign(q - 0.5) + 1) / 2, lambda q: (q > 0.5) + 0.5 * (q == 0.5),
        lambda q: torch.heaviside(q - 0.5, torch.tensor(0.5, dtype=q.dtype))],
    6: [lambda psi, p, tau: (2 * p - 1) * (psi(torch.ones(())) - psi(torch.zeros(()))) / (2 * tau),
        lambda psi, p, tau: (2 * p - 1) * (psi(1) - psi(0)) / (2 * tau),
        lambda psi, p, tau: p * (psi(torch.ones(1)) - psi(torch.zeros(1))) / (2 * tau)
        + (1 - p) * (psi(torch.zeros(1)) - psi(torch.ones(1))) / (2 * tau)],
    7: [flat, lambda q: flat(q) + 3, lambda q: (flat(q) + 0.5).float(),
        lambda q: torch.where(q > 0.5, (q - 0.6).clamp(min=0), -(0.4 - q).clamp(min=0)) / 0.8],
    8: [constant(P), constant(torch.tensor(P)), constant([[0.5, 1, 0.45], [0, 0.5, 0.6], [0.55, 0.4, 0.5]])],
    9: [lambda tau, L: tau * L, lambda tau, L: float(tau) * float(L), lambda tau, L: torch.tensor([tau * L])],
    10: [lambda tau: torch.softmax(torch.tensor([2.5, 1.5, 0.5]).double() / (3 * tau), 0),
         lambda tau: [1 / (1 + math.exp(-1 / (3 * tau)) + math.exp(-2 / (3 * tau))) * math.exp(-k / (3 * tau)) for k in range(3)],
         lambda tau: tuple(torch.softmax(-torch.arange(3) / (3 * tau), 0))],
    11: [constant((squared_hinge, lambda q: q * 2 - 1)), constant((savage, torch.logit)),
         constant([exponential, lambda q: torch.logit(q) / 2]), constant((hinge, lambda q: torch.sign(q - 0.5)))],
    12: [constant(torch.logit), constant(lambda q: 3 * torch.log(q / (1 - q)) + 1), constant(lambda q: -torch.logit(1 - q))],
    14: [lambda tau: (math.log(9) / tau, math.log(1999) / tau), lambda tau: [torch.logit(torch.tensor(0.9)) / tau, 7.6004 / tau],
         lambda tau: torch.stack([torch.tensor(9.0).log() / tau, torch.tensor(1999.0).log() / tau])],
    15: [lambda ref, p, tau: (p.mean(1) / tau).softmax(0), lambda ref, p, tau: (p.mean(1) / tau).softmax(0).tolist(),
         lambda ref, p, tau: minimiser(lambda logp: (((logp[:, None] - logp) - ipo.target(p, tau)) ** 2).sum(), 5)],
    16: [mean_form, lambda *a: mean_form(*a).tolist(),
         lambda ref, g, n, tau: minimiser(lambda logp: ((lambda s: (s[:, None] - s - (g[:, None] - g) / tau) ** 2)(
             (logp - ref.log()) / n)).sum(), 5)],
    17: [online(), online(label="soft"), online(draws="apart")],
    18: [fixed, lambda ref, p, tau: fixed(ref, p, tau, 0.05).tolist(), lambda ref, p, tau: fixed(ref.float(), p.float(), tau)],
    19: [lambda r: (r - (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1)).detach(),
         lambda r: (r.detach() - r.detach().mean(1, keepdim=True)) * 4 / 3,
         lambda r: torch.stack([r[:, i] - r[:, [j for j in range(4) if j != i]].mean(1) for i in range(4)], 1).detach().numpy()],
}
ANY = [answer_raises, stops, constant("no"), constant({}), constant(math.nan), constant(torch.zeros(2, 7)), constant([[1], [2, 3]]), lambda: 1]
WRONG = {
    1: [lambda tau: 1 / (2 * tau), lambda tau: 1 / (4 * tau), constant(25.0), lambda tau: "1/(4 tau^2)", lambda tau: [1, 2]],
    2: [constant((2, 2, 2)), constant((2, 4, 4)), constant((0.5, 0.25, 3)), constant((2, 4)), constant(2), constant("2, 4, 3")],
    3: [lambda tau: 10 * tau, lambda tau: torch.sigmoid(20 * tau), lambda tau: 1 - 1 / (1 + math.exp(-10 * tau)), constant(1.0), constant(2.0)],
    4: [lambda q: q * q, lambda q: q + 3, lambda q: 2 * q, lambda q: q**3, lambda q: q + 5 * (q - 0.5) ** 4 * 100, lambda q: q.float() ** 2,
        lambda q: q + 1e-9 * q**3, lambda q: q + torch.rand_like(q), lambda q: -q],
    5: [lambda q: (q > 0.5), lambda q: (q > 0.5).to(q.dtype), torch.sign, lambda q: (q >= 0.5) * 1.0, lambda q: 1 - q, lambda q: q.round(decimals=1),
        lambda q: torch.tensor(0.5), lambda q: 5, lambda q: (q / q)],
    6: [lambda psi, p, tau: (2 * p - 1) / (2 * tau), lambda psi, p, tau: (psi(p) - psi(1 - p)) / (2 * tau), lambda psi, p, tau: p * psi(1) / tau,
        lambda psi, p, tau: psi(1) / (2 * tau), lambda psi, p, tau: psi],
    7: [lambda q: 2 * flat(q), lambda q: flat(q) / 0.1, lambda q: q**3, lambda q: torch.sign(q - 0.5), lambda q: (q - 0.6).clamp(min=0),
        lambda q: flat(q).sort(descending=True).values, lambda q: q.log()],
    8: [constant([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]), constant([[0, 1, 0.4], [0, 0, 1], [0.6, 0, 0]]), constant([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]),
        constant([[0.5, 1.4, 0.49], [-0.4, 0.5, 0.51], [0.51, 0.49, 0.5]]), constant(torch.full((3, 3), 0.5)), constant([0.5, 1, 0.4])],
    9: [lambda tau, L: tau / L, lambda tau, L: tau, lambda tau, L: tau * L**2, lambda tau, L: L, lambda tau, L: -tau * L, lambda tau, L: 0],
    10: [lambda tau: torch.softmax(torch.tensor([1, 0.5, 0]) / tau, 0), lambda tau: [1 / 3] * 3, lambda tau: [1, 0, 0], lambda tau: [0.5, 0.5],
         lambda tau: torch.softmax(-torch.arange(3) / tau, 0), lambda tau: {"a": 1}],
    11: [constant((ipo.ipo_loss, lambda q: q)), constant((ipo_times(3.0), lambda q: q)), constant((dpo_at(1), torch.logit)),
         constant((dpo_at(2), lambda q: torch.logit(q) / 2)), constant((dpo_at(1, 0.2, 5), torch.logit)), constant((squared_hinge, torch.logit)),
         constant((savage, lambda q: q)), constant((lambda h, p, tau: -savage(h, p, tau), torch.logit)), constant(savage), constant((savage,)),
         constant((lambda h, p, tau: exponential(h, torch.ones(()), tau), torch.logit)), constant((lambda h, p, tau: 0 * h, lambda q: q)),
         constant((lambda h, p, tau: (100 * h * tau).exp() * (1 - p) + (-100 * h * tau).exp() * p, torch.logit)),
         constant((lambda h, p, tau: exponential(h, p, tau).detach(), lambda q: torch.logit(q) / 2)), constant((exponential, lambda q: q * math.inf))],
    12: [constant(lambda q: q), constant(lambda q: 0 * q), constant(torch.square), constant(torch.exp), constant("logit"), constant(lambda q: 1e-9 * torch.logit(q))],
    14: [lambda tau: (0, math.log(1999) / tau), lambda tau: (math.log(9) / tau, math.log(999) / tau), lambda tau: (math.log(9), math.log(1999)),
         lambda tau: (math.log(9) / tau, math.inf), lambda tau: math.log(9) / tau, lambda tau: (math.nan, math.nan)],
    15: [lambda ref, p, tau: optimum(ref, p.mean(1) / tau), lambda ref, p, tau: ref, lambda ref, p, tau: (p.mean(1) * tau).softmax(0), lambda ref, p, tau: p,
         lambda ref, p, tau: (p.mean(0) / tau).softmax(0), lambda ref, p, tau: p.mean(1) / tau],
    16: [lambda ref, g, n, tau: optimum(ref, g / tau), lambda ref, g, n, tau: optimum(ref, n * g / tau), lambda ref, g, n, tau: ref * (n * g / tau).exp(),
         lambda ref, g, n, tau: mean_form(ref, g, n / n, tau), lambda ref, g, n, tau: optimum(ref, g / tau / n), lambda ref, g, n, tau: -ref],
    17: [online(draws="uniform"), online(draws="once"), online(draws="half"), online(label="none"), online(label="swapped"), online(who="ref"),
         online(who="mask"), online(who="bare"), lambda *a: [], lambda *a: iter([1, 2])],
    18: [lambda ref, p, tau: optimum(ref, p.mean(1) / tau), lambda ref, p, tau: ref, lambda ref, p, tau: fixed(torch.ones(5) / 5, p, tau),
         lambda ref, p, tau: fixed(ref, p.T, tau), lambda ref, p, tau: fixed(ref, p, 2 * tau), lambda ref, p, tau: 2 * fixed(ref, p, tau)],
    19: [lambda r: (r - r.mean(1, keepdim=True)).detach(), lambda r: r, lambda r: ((r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True)).detach(),
         lambda r: r - (r.sum(1, keepdim=True) - r) / 3, lambda r: (r - (r.sum(0) - r) / 2).detach(), lambda r: r.mean(1)],
}


@pytest.mark.parametrize("n", RIGHT)
def test_right_answers_are_solved_and_others_get_a_hint(n):
    """At least three right and six wrong ones each; every hint is a sentence in one line, without a traceback."""
    assert len(RIGHT[n]) >= 3 and len(WRONG[n]) >= 5
    for answer in RIGHT[n]:
        assert exercises.grade(n, answer) == ("solved", ""), inspect.getsource(answer)
    for answer in (*WRONG[n], *ANY):
        state, hint = exercises.grade(n, answer)
        assert state == "wrong" and 10 < len(hint) < 400 and "\n" not in hint, (inspect.getsource(answer), state, hint)
    assert exercises.grade(n, constant(None)) == ("open", "")


def test_as_delivered_everything_is_open(monkeypatch, capsys):
    """The list has a line per exercise, all open; minutes add up to what the docstring says."""
    monkeypatch.setattr(ipo, "psi", exercises.identity)
    exercises.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(exercises.CHECKS) >= 15
    assert all(line.split()[0] == str(n) and line.endswith("open") for n, line in enumerate(lines, 1))
    assert round(sum(exercises.parts(n)[0] for n in exercises.CHECKS) / 60) == 10


@pytest.mark.parametrize("psi, states", [
    (RIGHT[4][0], "solved open open"), (RIGHT[5][0], "open solved open"), (RIGHT[7][0], "open open solved"),
    (torch.square, "wrong wrong wrong"), (answer_raises, "wrong wrong wrong"), (exercises.identity, "open open open")])
def test_one_psi_stands_for_three_exercises(psi, states, monkeypatch):
    """What is right for one of them is no wrong answer to the others."""
    monkeypatch.setattr(ipo, "psi", psi)
    result = exercises.grades()
    assert [result[n][0] for n in (4, 5, 7)] == states.split()
    assert {result[n][0] for n in result if n not in (4, 5, 7)} == {"open"} and ipo.psi is psi


def test_checks_see_the_psi_of_the_paper(monkeypatch):
    """Whatever stands between the banners, right answers to other exercises are right."""
    monkeypatch.setattr(ipo, "psi", torch.sign)
    assert {exercises.grade(n, RIGHT[n][0])[0] for n in (1, 9)} == {"solved"}


def test_a_psi_is_kept_under_its_number(monkeypatch):
    """psi_4 and psi_5 stay answers when psi goes on to exercise 7, right or wrong."""
    monkeypatch.setattr(ipo, "psi", torch.square)
    monkeypatch.setattr(ipo, "psi_4", RIGHT[4][1], raising=False)
    monkeypatch.setattr(ipo, "psi_5", torch.sign, raising=False)
    assert [exercises.grades()[n][0] for n in (4, 5, 7)] == ["solved", "wrong", "wrong"]


@pytest.mark.parametrize("n", exercises.CHECKS)
def test_what_is_printed_is_the_question_and_no_more(n, monkeypatch, capsys):
    """Neither hints that were not asked for nor a line of the check; with a wrong answer its hint."""
    monkeypatch.setattr(ipo, "psi", exercises.identity)
    exercises.main([str(n)])
    asked = capsys.readouterr().out
    _, title, question, hints = exercises.parts(n)
    code = inspect.getsource(exercises.CHECKS[n]).split('"""')[2]
    assert title in asked and question in asked and asked.rstrip().endswith("open")
    assert "See it: " in question or n == 13
    assert not any(line.strip() in asked for line in code.splitlines() if line.strip())
    assert not any(text[:30] in asked for text in hints.values())
    used = set(re.findall(r'need\(.*?"(\w+)"(?:, \w+=|\))', code))
    helpers = {4: {"value"}, 5: {"value"}, 7: {"value"}, 17: {"rows", "ref", "prompt"}}.get(n, set())
    assert used | helpers == hints.keys()
    if n in (4, 5, 7):
        monkeypatch.setattr(ipo, "psi", answer_raises)
    else:
        monkeypatch.setattr(exercises, f"answer_{n:02}", answer_raises)
    exercises.main([str(n)])
    assert "wrong. Hint: line" in capsys.readouterr().out


def test_programs_that_questions_name_exist():
    """python -m lab.NAME; a flag is the program's, or ipo.py's, whose flags the programs pass on."""
    for check in exercises.CHECKS.values():
        for name in re.findall(r"python -m lab\.(\w+)", check.__doc__):
            assert (HERE / f"lab/{name}.py").exists(), name
        for program, line in re.findall(r"python (ipo\.py|-m lab\.\w+)(.*)", check.__doc__):
            source = (HERE / program.replace("-m lab.", "lab/").removesuffix(".py")).with_suffix(".py").read_text()
            for flag in re.findall(r"--[a-z_]+", line.split(";")[0]):
                assert f'"{flag}"' in source + (HERE / "ipo.py").read_text(), (program, flag)
    assert "EXERCISE: another mu" in (HERE / "ipo.py").read_text()


def test_an_exercise_that_is_none_is_refused(capsys):
    """One line and status 2."""
    for number in ("0", "20", "seven"):
        with pytest.raises(SystemExit) as stop:
            exercises.main([number])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_psi_half_typed_is_one_line(tmp_path):
    """A syntax error between the banners ends `python -m lab.course.exercises` with the line of ipo.py, no traceback."""
    (tmp_path / "lab").mkdir()
    for name in ("model.py", "data.py", "lab/course/exercises.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / "ipo.py").write_text((HERE / "ipo.py").read_text().replace("    return q\n", "    return q q\n", 1))
    run = subprocess.run([sys.executable, "-m", "lab.course.exercises", "7"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "ipo.py, line" in run.stderr and not run.stdout


def test_silent_bugs_stand_in_the_core():
    """Each line is in its file, what it becomes is not, and the file still compiles."""
    bugs = exercises.bugs()
    assert len(bugs) == 8
    for what, name, line, becomes in bugs:
        text = (HERE / name).read_text()
        assert line in text and (text.count(line) == 1 or "reference" in what), what
        compile(text.replace(line, becomes, 1), name, "exec")
    train = inspect.getsource(ipo.train)
    assert "h = margin(logp, ref_logp)" in train
    assert (HERE / "ipo.py").read_text().index("h = margin(logp, ref_logp)") > (HERE / "ipo.py").read_text().index("def train")


def test_exercise_13_runs_tests_on_copies(tmp_path, monkeypatch):
    """A small core stands in for ours: one test sees bug 4, one sees nothing, one fails always."""
    (tmp_path / "ipo.py").write_text("def margin(chosen, rejected):\n    return chosen - rejected\n")
    (tmp_path / "test_ipo.py").write_text("import ipo\n\ndef test_order():\n    assert ipo.margin(3, 1) == 2\n"
                                          "def test_blind():\n    pass\ndef test_red():\n    assert 0\n")
    monkeypatch.setattr(ipo, "__file__", str(tmp_path / "ipo.py"))
    assert exercises.grade(13, constant({4: "test_order"})) == ("solved", "")
    for answer, hint in (({4: "test_blind"}, "test_blind passes"), ({4: "test_red"}, "fails without the bug"),
                         ({4: "test_absent"}, "not in test_ipo.py"), ({4: "test_order", 9: "test_order"}, "numbers from 1"),
                         ({}, "a dict"), ([4, "test_order"], "a dict"), ({"4": "test_order"}, "a dict"), ("test_order", "a dict")):
        state, said = exercises.grade(13, constant(answer))
        assert state == "wrong" and hint in said, (answer, said)
    assert exercises.grade(13, constant(None)) == ("open", "")
    assert exercises.grade(13, answer_raises)[0] == "wrong"


@pytest.mark.parametrize("n, answer", [(11, RIGHT[11][1]), (17, RIGHT[17][1])])
def test_runs_of_the_questions_work(n, answer, tmp_path, monkeypatch, capsys):
    """The program between <<END and END, in small, with a right answer: online pairs go through the loop unchanged."""
    monkeypatch.setattr(exercises, f"answer_{n}", answer)
    monkeypatch.setattr(ipo, "offline", ipo.offline)
    monkeypatch.setattr(ipo, "LOSSES", dict(ipo.LOSSES))
    monkeypatch.setattr(ipo, "WORTH", dict(ipo.WORTH))
    program = exercises.parts(n)[2].split("<<END\n")[1].split("\nEND")[0]
    small = f'"--steps", "6", "--sft_steps", "3", "--pairs", "500", "--batch_size", "20", "--log_every", "3", "--out", "{tmp_path}"'
    program = program.replace('"--out", "out/online"', small).replace('"--labels", "soft"]', f'"--labels", "soft", {small}]')
    assert small in program
    exec(program, {})
    assert "step     6/6" in capsys.readouterr().out and (tmp_path / "report.json").exists()


def test_without_its_reference_a_run_is_stopped(tmp_path):
    """Exercise 15: zeros for ref_logp end at the check of step 0."""
    args = ipo.parse(["--steps", "2", "--sft_steps", "2", "--pairs", "99", "--batch_size", "9", "--out", str(tmp_path), "--device", "cpu"])
    offline = ipo.offline
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "offline", lambda *a: ((batch, 0 * ref) for batch, ref in offline(*a)))
        with pytest.raises(ipo.Stopped, match="step 0: margins"):
            ipo.run(args)
