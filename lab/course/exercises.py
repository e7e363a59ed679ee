"""Is this answer right, and if not, which hint helps? This is no program; python -m lab.course uses it.

Write your answers at the top, between the banners. Questions and hints stand in EXERCISES.md. check_7 looks
at an answer to question 7, and names a hint if it is wrong. Whatever an answer is, returns or raises, there
is a hint, and no hint holds the answer.
Trap: the checks, below the second banner, give answers away. Read them afterwards.
"""
import math
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch

import data
import ipo

# =============================================== YOUR ANSWERS ===============================================
# Each stands in place of its line that says open, in as many lines as you like. data, ipo, math and torch
# may be used. Numbers come as tensors (), float64, and answers may be plain numbers. Write helpers inside the
# functions, since names of the checks would replace them. 4, 5 and 7 are psi, between the banners of ipo.py.


def answer_1(p, tau):  # IPO's loss at step 0 of a pair with this p, nats^2
    return None  # open


def answer_2():  # (factor of the target, of the loss at step 0, of KL(pi*||ref)), tau from .2 to .1
    return None  # open


def answer_3(tau):  # the p at which Psi = logit asks for a margin of 10 nats
    return None  # open


def answer_6(psi, p, tau):  # the margin that hard labels ask for, on average over their coin flips
    return None  # open


def answer_8():  # p*: three rows of three numbers
    return None  # open


def answer_9(tau, L):  # the tau that gives the mean form the sum form's minimiser; responses of L tokens
    return None  # open


def answer_10(tau):  # [pi(a), pi(b), pi(c)]
    return None  # open


def answer_11():  # (loss, psi): two functions, loss(h, p, tau) -> (B,) and psi(q)
    return None  # open


def answer_12():  # a Psi: a function of a tensor q
    return None  # open


def answer_13():  # {number of a bug: name of a test of test_ipo.py that it breaks}
    return None  # open


def answer_14(tau):  # (h where DPO's slope is 0 at p = .9, h where it is 1/1000 of step 0's at p = 1)
    return None  # open


def answer_15(ref, p, tau):  # (Y,), (Y,Y), () -> pi (Y,)
    return None  # open


# ============================== END OF YOUR ANSWERS, THE CHECKS GIVE THEM AWAY ==============================

PAGE = Path(__file__).with_name("EXERCISES.md")
SHARED = (4, 5, 7)  # answered by psi, between the banners of ipo.py


class Wrong(Exception):
    """A hint's name, and the numbers that its text shows."""


def need(right, hint, **shown):
    if not right:
        raise Wrong(hint, shown)


def numbers(value, *shape):
    """An answer as a tensor of this shape; () is a single number."""
    try:
        return torch.as_tensor(value).double().reshape(shape)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong("shape", {"shape": list(shape), "yours": data.short(value)}) from None


def exact(value):
    return torch.tensor(value, dtype=torch.float64)


def close(found, due):
    return torch.allclose(found, due, rtol=1e-3, atol=1e-5)


def compare(answer, cases, due):
    """answer(*case) is to be due(*case), for cases of plain numbers."""
    for case in cases:
        given = [exact(value) for value in case]
        right = due(*given)
        found = numbers(answer(*given), *right.shape)
        need(close(found, right), "value", case=case)


def asks(psi, p, tau=0.1):
    """ipo.target with this psi."""
    return (psi(p) - psi(1 - p)) / (2 * tau)


def identity(q):
    return q


def curve(psi):  # -> (1001,), (1001,)
    """A grid on [0,1], and psi there."""
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    value = psi(q)
    need(not torch.equal(value, q), "open")
    need(value.shape == q.shape, "one shape")
    need(not value.isnan().any(), "nan")
    need(value.diff().min() > -1e-6, "falls")
    need(psi(q[:9]).allclose(value[:9]), "alone")
    return q, value.double()


def on_curve(q, value, due):
    off = (value - due).abs()
    at = off.argmax()
    shown = {"q": q[at], "value": value[at], "due": due[at]}
    need(off[at] < 1e-3, "value", **shown)


def optimum(ref, p, tau, mu=None, worth=identity):  # (Y,), (Y,Y) -> (Y,)
    """pi* of one prompt; mu is uniform unless given."""
    if mu is None:
        mu = torch.full_like(ref, 1 / len(ref))
    one = [ref.log()[None], worth(p)[None], mu[None]]  # prompt
    return data.optimum(*one, tau).exp()[0]


# ---------------------------------------------------------------------------------- a check for each question

TAUS = (0.05,), (0.1,), (0.5,), (2.0,)
CASES = (0.9, 0.1), (0.6, 0.5), (0.5, 0.1)  # p, tau


def check_1(answer):
    compare(answer, CASES, lambda p, tau: ((2 * p - 1) / (2 * tau)) ** 2)


def check_2(answer):
    target, loss, kl = numbers(answer(), 3).tolist()
    need(target == 2, "target")
    need(loss == 4, "loss")
    need(2.7 < kl < 3.3, "kl")


def check_3(answer):
    compare(answer, TAUS, lambda tau: torch.sigmoid(10 * tau))


def check_4(psi):
    q, value = curve(psi)
    on_curve(q, asks(psi, q), asks(identity, q))
    # of neighbours it would be rounding
    need(value[::37].diff(n=3).abs().max() > 1e-5, "bend")


def check_5(psi):
    q, value = curve(psi)
    on_curve(q, value, (torch.sign(q - 0.5) + 1) / 2)


def check_6(answer):
    # if psi is exp, psi(1) - psi(0) is e - 1
    compare(lambda p, tau: answer(torch.exp, p, tau), CASES,
            lambda p, tau: (2 * p - 1) * (math.e - 1) / (2 * tau))


def check_7(psi):
    q, _ = curve(psi)
    beyond = ((q - 0.5).abs() - 0.1).clamp(min=0)
    on_curve(q, asks(psi, q), 5 * torch.sign(q - 0.5) * beyond / 0.4)


def check_8(answer):
    p = numbers(answer(), 3, 3)
    need(close(p + p.T, torch.ones_like(p)), "sum")
    need(p.min() >= 0, "sum")
    need(min(p[0, 1], p[1, 2], p[2, 0]) > 0.5, "cycle")
    pi = optimum(torch.full_like(p[0], 1 / 3), p, 0.1)
    need(pi[0] > 0.75, "favourite", pi=pi.numpy().round(3))


def check_9(answer):
    compare(answer, [(0.2, 4.0), (0.5, 7.0)], lambda tau, L: tau * L)


def check_10(answer):
    wins = exact([2.5, 1.5, 0.5])  # over three opponents, the action itself too
    compare(answer, TAUS, lambda tau: (wins / 3 / tau).softmax(0))


def check_11(answer):
    loss, psi = answer()
    h = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    value = numbers(loss(h, torch.ones_like(h), 1.0), 4801)
    need(value.isfinite().all(), "finite")
    [slope] = torch.autograd.grad(value.sum(), h)
    need(slope[2400] < 0, "slope", slope=slope[2400])
    need((slope + slope.flip(0)).std() > 1e-6, "known")
    for p in torch.linspace(0.05, 0.95, 19)[:, None].double():
        value = loss(h, p.expand(4801), 1.0)
        need(close(value, loss(-h, 1 - p.expand(4801), 1.0)), "swap")
        asked = asks(psi, p, 1.0)
        shown = {"p": p.item(), "best": h[value.argmin()], "asked": asked.item()}
        need(abs(asked) < 12, "psi", **shown)
        need(loss(asked, p, 1.0) - value.min() < 1e-6, "psi", **shown)


def check_12(answer):
    psi = answer()
    r = exact([-1.0, -0.3, 0.2, 0.9, 1.5])
    ref = (r.flip(0) / 2).softmax(0)
    p = (r[:, None] - r).sigmoid()
    pi = optimum(ref, p, 0.5, worth=psi)
    other = optimum(ref, p, 0.5, r.softmax(0), psi)
    gap = (other - pi).abs().max()
    need(not close(pi, ref), "nothing")
    need(gap < 1e-5, "moves", gap=gap)


def check_13(answer):
    named = answer()
    need(isinstance(named, dict) and named and named.keys() <= set(range(1, 9)), "dict")
    for number, name in named.items():
        need(passes(0, name), "clean", name=name)
        need(not passes(number, name), "passes", number=number, name=name)


def bugs():
    """[file, line, what it becomes] of each, from the table of question 13."""
    return re.findall(r"^\| \d \| .*? \| (\S+) \| `(.+?)` \| `(.+?)` \|$", PAGE.read_text("utf-8"), re.M)


def passes(number, name):
    """Does this test of test_ipo.py pass on a copy of the core with that bug (0: none)?"""
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(ipo.__file__).parent.glob("*.[pm][yd]"):  # .py and .md, and no folder as .github
            shutil.copy(path, folder)
        if number:
            file, line, becomes = bugs()[number - 1]
            path = Path(folder, file)
            path.write_text(path.read_text().replace(line, becomes, 1))
        command = f"-m pytest -qx -p no:cacheprovider test_ipo.py::{name}".split()
        return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True).returncode == 0


def check_14(answer):
    compare(answer, TAUS, lambda tau: exact([9.0, 1999.0]).log() / tau)


def check_15(answer):
    random = torch.Generator().manual_seed(0)
    for tau in exact([0.1, 0.3, 1.0]):
        draws = torch.randn(6, 5, generator=random).double()
        ref = draws[5].softmax(0)
        gap = 3 * draws[:5]
        p = (gap - gap.T).sigmoid()  # intransitive
        pi = numbers(answer(ref, p, tau), 5)
        need(not close(pi, optimum(ref, p, tau)), "offline")
        off = (optimum(ref, p, tau, mu=pi) - pi).abs().max()
        need(off < 1e-4, "fixed", off=off, sum=pi.sum())


# ----------------------------------------------------------------------------- the state of a student's work

def hints(number):
    """The hints to a question, by name, and those to all."""
    text = PAGE.read_text(encoding="utf-8")
    parts = re.findall("<!-- hints\n(.*?)-->", text, re.S)
    return dict(re.findall("^(.+?): (.+)$", parts[0] + parts[number], re.M))


def written(number):
    """The answer that stands there."""
    if number in SHARED:
        return getattr(ipo, f"psi_{number}", ipo.psi)
    return globals()[f"answer_{number}"]


def grade(number, answer):
    """("solved", "open" or "wrong", hint). A check sees the paper's psi, whatever stands in ipo.py."""
    def ask(*question):
        value = answer(*question)
        need(value is not None, "open")
        return value

    try:
        with mock.patch.object(ipo, "psi", identity):
            globals()[f"check_{number}"](ask)
        return "solved", ""
    except Wrong as wrong:
        name, shown = wrong.args
        if name == "open":
            return "open", ""
        return "wrong", hints(number)[name].format(**shown)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        return "wrong", f"line {line}: {type(error).__name__}: {data.short(error)}"


def state(number):
    """The grade of what stands there. One psi answers one question, and leaves the others open."""
    found = grade(number, written(number))
    if number in SHARED and written(number) is ipo.psi:
        others = [grade(other, ipo.psi)[0] for other in SHARED]
        if found[0] == "wrong" and "solved" in others:
            return "open", ""
    return found
