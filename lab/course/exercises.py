"""What have I understood? Nineteen exercises, asked and checked in one place.

  python -m lab.course.exercises        the list: number, minutes, title; solved, open or wrong
  python -m lab.course.exercises 7      the question, and whether what stands there is right, or a hint

Where to write: the answers to 4, 5 and 7 are psi between the banners of ipo.py (to keep one when you go on,
copy it to psi_4, psi_5 or psi_7 there; a psi must remain); that of any other is the line below that says
open, or as many lines in its place as you like. data, ipo, math and torch may be used; numbers come as
tensors (), float64. A check takes a second and no run (13: some seconds a bug, and so the list); most
questions name a run that shows the matter. What they ask beyond the value is for you.
Whatever an answer is, returns or raises, there is a hint, and no hint holds the answer. (None counts as open:
is a return missing?)
Trap: how answers are checked stands below them. Read that afterwards.
Answer: nineteen times solved, after ten hours by the minutes of the list.
"""
import argparse
import inspect
import math
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch

try:
    import data
    import ipo
    import model
    ipo.psi  # a student may have renamed it
except (Exception, SystemExit) as broken:  # psi, half typed
    sys.exit(f"exercises: ipo.py does not run ({broken}); mend what stands between its banners")

# ====================================== ANSWERS: write yours here =======================================


def answer_01(tau):  # IPO's loss at step 0 if all pairs are certain, nats^2
    return None  # open


def answer_02():  # (factor of the target, of the loss at step 0, of KL(pi*||ref)), tau from .2 to .1
    return None  # open


def answer_03(tau):  # the p at which Psi = logit asks for a margin of 10 nats
    return None  # open


def answer_06(psi, p, tau):  # the margin that hard labels ask for, on average over their coin flips
    return None  # open


def answer_08():  # p*: three rows of three numbers
    return None  # open


def answer_09(tau, L):  # the tau that gives the mean form the sum form's minimiser; responses of L tokens
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


def answer_16(ref, g, length, tau):  # (Y,), (Y,), (Y,), () -> pi (Y,)
    return None  # open


def answer_17(source, policy, ref_logp, args):  # yields (data.Batch of B pairs, their ref_logp (2B,))
    return None  # open


def answer_18(ref, p, tau):  # (Y,), (Y,Y), () -> pi (Y,)
    return None  # open


def answer_19(reward):  # (X,k) -> (X,k)
    return None  # open


# ========================================= END OF THE ANSWERS ==========================================


class Wrong(Exception):
    """A hint: its name in the docstring of the check, or its text; and the numbers that it shows."""


def need(right, hint, **numbers):
    if not right:
        raise Wrong(hint, numbers)


def tensor(value, *shape):
    """An answer in numbers, as a tensor; () is a single number."""
    try:
        return torch.as_tensor(value).double().reshape(shape)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"numbers of shape {shape} are due; () is one number; yours: {value!r:.50}", {}) from None


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def near(value, due, share=1e-3):
    return abs(value - due) <= share * abs(due) + 1e-6


def identity(q):
    return q


def asks(psi, p, tau=0.1):
    """ipo.target with this psi."""
    return (psi(p) - psi(1 - p)) / (2 * tau)


def curve(psi):
    """A grid on [0,1], and psi there."""
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    value = psi(q)
    need(not torch.equal(value, q), "open")
    need(value.shape == q.shape, f"psi must return the shape that it gets, not {tuple(value.shape)}")
    need(not value.isnan().any(), "psi is NaN somewhere in [0,1]; which operation is undefined there?")
    need((value.diff() > -1e-6).all(), "psi falls somewhere: what more people prefer is not worth less")
    need(psi(q[:9]).allclose(value[:9]), "psi must depend on q alone: not on its neighbours, not on chance")
    return q, value.double()


def compare(value, due, q):
    off = (value - due).abs()
    at = off.argmax()
    need(off[at] < 1e-3, "value", q=q[at], value=value[at], due=due[at])


def optimum(ref, p, tau, mu=None, worth=identity):  # (Y,), (Y,Y) -> (Y,)
    """pi* of one prompt; mu is uniform unless given."""
    mu = torch.full_like(ref, 1 / len(ref)) if mu is None else mu
    return data.optimum(ref.log()[None], worth(p)[None], mu[None], tau).exp()[0]


def problems():
    """(ref, p, tau) of one prompt with five responses, p intransitive."""
    generator = torch.Generator().manual_seed(0)
    for tau in (0.1, 0.3, 1.0):
        ref = torch.randn(5, generator=generator).double().softmax(0)
        gap = 3 * torch.randn(5, 5, generator=generator).double()
        yield ref, (gap - gap.T).sigmoid(), scalar(tau)


# ------------------------------------------------------------ the exercises: question, hints; check

def check_01(answer):
    """5 min: The loss at step 0

    All labels are certain. What is IPO's loss at step 0, before any update, as a formula in tau?

    See it: python ipo.py --tau 0.5 --steps 50, other taus; the line "step 0: loss ..., theory ..."

    Hints
      start: not at tau {tau}. Where is pi before any update, and so what is h?
    """
    for tau in (0.05, 0.2, 0.5, 2.0):
        due = ipo.ipo_loss(scalar(0.0), scalar(1.0), tau)
        need(near(tensor(answer(scalar(tau))), due), "start", tau=tau)


def check_02(answer):
    """5 min: Half of tau

    tau goes from .2 to .1. By what factors change the margin that a certain pair asks for; the loss at step
    0, all labels certain; KL(pi*||ref) in the world bt? The third to 10 %: predict it, then read it off.

    See it: python ipo.py --tau 0.2, --tau 0.1; step 0; kl_ref in column opt of the first table

    Hints
      target: the first: what is the target of p = 1?
      loss: the second: h is 0 at step 0, so what is left of (h - target)^2?
      kl: the third: differences of log pi*/ref double, and KL is half the variance of log pi*/ref, but only
        while pi* is near to ref; read it off two runs
    """
    target, loss, kl = tensor(answer(), 3)
    world = data.World("bt")
    ref = (world.base + 1e-9).log().expand_as(world.reward)
    mu = torch.full_like(ref, 1 / ref.shape[1])
    far, close = (data.kl(data.optimum(ref, world.pstar, mu, tau), ref) for tau in (0.1, 0.2))
    need(near(target, 2), "target")
    need(near(loss, 4), "loss")
    need(near(kl, far / close, 0.1), "kl")


def check_03(answer):
    """10 min: Where DPO over-fits

    Psi = logit is DPO's. At which p does it ask for a margin of 10 nats, as a formula in tau? And at p = 1?

    See it: write torch.logit(q) between the banners of ipo.py; python ipo.py: what is refused, and why? Then
    python ipo.py --labels soft, where no label is certain.

    Hints
      asked: at tau {tau} your p asks for {asked:.4g} nats, not for 10; how are logit(p) and logit(1-p)
        related?
    """
    for tau in (0.05, 0.1, 0.3):
        p = tensor(answer(scalar(tau)))
        asked = asks(torch.logit, p, tau)
        need(near(asked, 10), "asked", asked=asked, tau=tau)


def check_04(psi):
    """15 min: Two Psis, one policy, two optima

    Between the banners of ipo.py write a psi that never falls, asks every pair for the margin that the
    paper's psi = q asks it for, and is neither affine nor quadratic in q.

    See it: psi = q * q is such a psi, but for the last. python ipo.py --labels soft with it, then with psi
    = q: targets and policy are the same (prove it), and yet pi* is another. The table before training says
    so: column labels is where the loss leads with endless labels, column opt is pi* of eq. 7, and they
    differ. So a kl_opt far from 0 after training is no sign here of a run that is not finished; kl_labels
    goes to 0.

    Hints
      value: a pair at p = {q:.3f} is asked for {value:.3f} nats at tau .1, by psi = q for {due:.3f}; what
        may be added to q that cancels in Psi(q) - Psi(1-q)?
      bend: it is affine, so pi* is that of the identity, too, or quadratic, as the example was; bend it
        another way
    """
    q, value = curve(psi)
    compare(asks(psi, q), asks(identity, q), q)
    need(value[::37].diff(n=3).abs().max() > 1e-5, "bend")  # differences of neighbours would be rounding


def check_05(psi):
    """15 min: The majority

    Between the banners of ipo.py write the majority's psi: a response is worth 1 against another if more than
    half prefer it, 0 if fewer than half do, and 1/2 in a tie.

    See it: python ipo.py --data cyclic --labels soft. A lead of one vote counts like unanimity: what
    happens to kl_ref and to the win rate, against psi = q?

    Hints
      value: at q = {q:.3f} it is {value:.3f}; there are three cases, and a tie is one of them
    """
    q, value = curve(psi)
    compare(value, (torch.sign(q - 0.5) + 1) / 2, q)


def check_06(answer):
    """20 min: Hard labels see two numbers

    A hard label is a coin flip: with probability p the first response wins. Which margin do hard labels ask a
    pair for, on average over the coin, for any psi? psi(torch.ones(())) is the value of psi at 1.

    See it: python ipo.py with psi = torch.tanh(8 * (q - 0.5)), then with psi = q and half of the tau: compare
    kl_ref in column labels, and in column opt. Which Psi do hard labels train, whatever you write?

    Hints
      mean: not at p = {p}, tau {tau}. What is h asked for if the first wins, with weight p, and what if the
        second does, with weight 1 - p?
    """
    for p, tau in ((0.5, 0.1), (0.6, 0.5), (0.9, 0.1)):
        due = p * asks(math.exp, 1.0, tau) + (1 - p) * asks(math.exp, 0.0, tau)
        need(near(tensor(answer(math.exp, scalar(p), scalar(tau))), due), "mean", p=p, tau=tau)


def check_07(psi):
    """30 min: A Psi to order

    Between the banners of ipo.py write a psi that never falls and asks for a margin of 0 if p is from .4 to
    .6; from there the margin grows on a straight line up to 1/(2 tau) at p = 1, and the same downwards. The
    scale: at tau .1 a certain pair asks for 5 nats, as under the paper's psi; a constant added to psi
    changes no margin, a factor changes all of them.

    See it: python ipo.py --labels soft; a picture of a formula: marimo run lab/course/explore.py; of what other Psis
    got: python -m lab.paper.psi --psi cubic. Pairs that ask for 0 will not get 0, and that is no failure: a margin
    is a difference of two scores, one a response, so pi* is the compromise with least squares between what
    all pairs ask for.

    Hints
      value: at p = {q:.3f}, tau .1 it asks for {value:.3f} nats, not for {due:.3f}; first draw the curve of
        psi from 0 to 1: where must it be flat?
    """
    q, _ = curve(psi)
    due = 5 * torch.sign(q - 0.5) * ((q - 0.5).abs() - 0.1).clamp(min=0) / 0.4
    compare(asks(psi, q), due, q)


def check_08(answer):
    """20 min: A cycle with a favourite

    If a beats b, b beats c and c beats a, always, IPO and DPO both end at 1/3 each. Find p* on three
    responses, p[0][1] = p*(a > b), where a is preferred to b more often than not, b to c and c to a, and yet
    IPO's pi*(a) is above .75, at tau .1 with mu and ref uniform.

    See it: python -m lab.paper.paper --data d2, the cycle that is certain

    Hints
      sum: p*(y>y') + p*(y'>y) = 1 for every pair, also of y with itself; and none is outside [0, 1]
      cycle: a > b, b > c, c > a: p[0][1], p[1][2] and p[2][0] are to be above 1/2
      favourite: pi* is {pi}; it weighs the mean of p* over all opponents. What may a lose by, what can a
        win by?
    """
    p = tensor(answer(), 3, 3)
    need(torch.allclose(p + p.T, torch.ones_like(p)) and p.min() >= 0, "sum")
    need(min(p[0, 1], p[1, 2], p[2, 0]) > 0.5, "cycle")
    pi = optimum(torch.full_like(p[0], 1 / 3), p, 0.1)
    need(pi[0] > 0.75, "favourite", pi=[round(x, 3) for x in pi.tolist()])


def check_09(answer):
    """20 min: Mean against sum

    Some tools divide each log-prob by the length of the response (here --logp mean). If all responses have L
    tokens: which tau gives the mean form the minimiser that the sum form has with tau?

    See it: python ipo.py --tau 0.5, then with --logp mean and your tau: kl_ref. (Most responses have 3
    tokens.)

    Hints
      asked: at tau {tau}, L = {L} a certain pair is asked for {h:.4g} nats between its log-probs, not for
        {due:.4g}
    """
    for tau, L in ((0.1, 1), (0.2, 4), (0.5, 7)):
        mean_tau = tensor(answer(scalar(tau), scalar(L)))
        h, due = L * ipo.target(scalar(1.0), mean_tau), ipo.target(scalar(1.0), tau)
        need(near(h, due), "asked", tau=tau, L=L, h=h, due=due)


def check_10(answer):
    """30 min: Figure 1 of the paper

    Three actions and no prompt; a beats b and c, b beats c, always; mu and ref are uniform. Where does IPO
    end, in closed form?

    See it: python -m lab.paper.paper --data d1

    Hints
      value: not at tau {tau}; in eq. 7 y' is drawn from mu. Who are the opponents of a, all of them?
    """
    p = scalar([[0.5, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5]])
    for tau in (0.1, 0.3, 1.0, 2.0):
        due = optimum(torch.full_like(p[0], 1 / 3), p, tau)
        need(torch.allclose(tensor(answer(scalar(tau)), 3), due, atol=1e-3), "value", tau=tau)


def check_11(answer):
    """60 min: A loss of your own

    Write loss(h, p, tau) that is not in the core, and the Psi whose optimum it aims at: for every p the
    loss is least at h = (Psi(p) - Psi(1-p)) / (2 tau). To swap the two responses must change nothing.
    Refused are IPO and DPO under another name, scaled, or at another tau; and any square (h - target)^2,
    which is IPO with another Psi.

    See it: python - <<END
    import ipo, lab.course.exercises
    ipo.LOSSES["mine"], ipo.WORTH["mine"] = lab.course.exercises.answer_11()
    ipo.main(["--loss", "mine", "--tau", "1", "--labels", "soft"])
    END
    kl_opt goes to 0 only if Psi(p*) - Psi(1-p*) is a difference of scores, as logit's is in bt. Squares are
    the exception: averaging is linear for them, so IPO ends at pi* whatever p* is.

    Hints
      finite: the loss is not finite for tau h from -12 to 12; which term overflows?
      slope: at h = 0, p = 1 the slope is {slope:.3f}; the first step is to raise h
      swap: h and p must give what -h and 1 - p give
      square: it is a square in h: IPO, with a Psi of yours
      dpo: it is DPO, perhaps scaled, or at another tau
      psi: at p = {p:.2f}, tau {tau} the loss is least at h = {best:.2f}, and Psi asks for {asked:.2f};
        where is the slope of the loss zero?
    """
    loss, psi = answer()
    for tau in (1.0, 0.5):
        h = torch.linspace(-12 / tau, 12 / tau, 4801, dtype=torch.float64, requires_grad=True)
        value = tensor(loss(h, torch.ones_like(h), tau), 4801)
        need(value.isfinite().all(), "finite")
        slope, = torch.autograd.grad(value.sum(), h)
        need(slope[2400] < 0, "slope", slope=slope[2400])
        need(value[::100].diff(n=3).abs().max() > 1e-6, "square")
        need(not logistic(h, value, slope), "dpo")
        for p in torch.linspace(0.05, 0.95, 19, dtype=torch.float64):
            value = loss(h, p.expand(4801), tau)
            need(torch.allclose(value, loss(-h, 1 - p.expand(4801), tau)), "swap")
            asked, best = asks(psi, p[None], tau), h[value.argmin()]
            least = abs(asked) <= h[-1] and loss(asked, p[None], tau) <= value.min() + 1e-6
            need(least, "psi", p=p, tau=tau, best=best, asked=asked.item())


def logistic(h, value, slope):
    """Is this a log(1 + exp(-k h)) and a constant? At 0 its slope is -a k / 2, its curvature a k^2 / 4."""
    curvature = (slope[2401] - slope[2399]) / (h[2401] - h[2399])
    k = -2 * curvature / slope[2400]
    rest = value + 2 * slope[2400] / k * ipo.dpo_loss(h, torch.ones_like(h), k)
    return rest.max() - rest.min() < 1e-3 * (value.max() - value.min())


def check_12(answer):
    """60 min: Where responses come from

    pi* depends on mu, the distribution that responses are drawn from. For which Psi is pi* the same for every
    mu, if preferences are Bradley-Terry? Find one that asks for something at all, and prove it.

    See it: in a copy of the folder, edit the line of ipo.py that is marked "EXERCISE: another mu", say to
    uniform = (4 * self.pstar.mean(-1)).softmax(-1), good responses more often. python ipo.py --labels soft:
    kl_ref in column opt before and after the edit, for psi = q and for yours.

    Hints
      nothing: it asks for nothing: pi* is ref, since Psi(p) - Psi(1-p) is 0
      moves: pi* moves by {gap:.3f} when mu does; which Psi makes of p*(y>y') a difference of two rewards?
    """
    psi = answer()
    r = scalar([-1.0, -0.3, 0.2, 0.9, 1.5])
    ref, p = (r.flip(0) / 2).softmax(0), (r[:, None] - r).sigmoid()
    pi, high, low = (optimum(ref, p, 0.5, (c * r).softmax(0), psi) for c in (0, 1, -2))
    need((pi - ref).abs().max() > 1e-3, "nothing")
    gap = (torch.stack([high, low]) - pi).abs().max()
    need(gap < 1e-5, "moves", gap=gap)


def check_13(answer):
    """120 min: Find the silent bug

    Each of these lines trains without an error (2 on files only: in a world it scores words that the model
    cannot say); of bug 5 the first such line. Put one into a copy of the folder; predict what the log shows
    and which test of test_ipo.py fails; then run python ipo.py (2 and 8: with --data FILE.jsonl --tokenizer
    bytes; 7: with --logp mean) and pytest test_ipo.py. Answer with a failing test for as many as you like;
    it is to run the code, not to read its text. To check takes some seconds a bug.

    1 | mask shifted by one   | ipo.py  | row, t = mask[:, 1:].nonzero(as_tuple=True)
                                        | row, t = mask[:, :-1].nonzero(as_tuple=True)
    2 | prompt scored         | data.py | real & (t >= self.prompt_len[rows, None])
                                        | real & (t >= 1)
    3 | padding scored        | data.py | real & (t >= self.prompt_len[rows, None])
                                        | (t >= self.prompt_len[rows, None])
    4 | winner, loser swapped | ipo.py  | return chosen - rejected
                                        | return rejected - chosen
    5 | reference not frozen  | ipo.py  | h = margin(logp, ref_logp)
                                        | h = margin(logp, logp.detach())
    6 | mean for sum          | ipo.py  | return total / mask.sum(1) if mean else total
                                        | return total / mask.sum(1)
    7 | pads in the length    | ipo.py  | return total / mask.sum(1) if mean else total
                                        | return total / mask.shape[1] if mean else total
    8 | end of text unscored  | data.py | array("i", chosen + eot)), (prompt, array("i", rejected + eot))
                                        | array("i", chosen)), (prompt, array("i", rejected))

    Hints
      dict: a dict {{number: "test_name"}} is asked for, numbers from 1 to 8
      clean: {name} is not in test_ipo.py, or fails without the bug, too; with your other edits, perhaps?
      passes: with bug {number} {name} passes: what does the line compute, and which test compares that with a
        number from elsewhere?
    """
    named = answer()
    need(isinstance(named, dict) and named.keys() <= set(range(1, 9)) and named, "dict")
    for number, name in named.items():
        need(passes(0, name), "clean", name=name)
        need(not passes(number, name), "passes", number=number, name=name)


def bugs():
    """(what, file, line, what it becomes) of each, from the table above."""
    return re.findall(r"\n *\d \| (.+?) *\| (\S+) *\| (.+)\n +\| (.+)", check_13.__doc__)


def passes(number, name):
    """Does this test of test_ipo.py pass on a copy of the core with that bug (0: none)?"""
    home = Path(ipo.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        for file in (*home.glob("*.py"), *home.glob("*.md"), *home.glob("*.txt")):
            Path(folder, file.name).write_bytes(file.read_bytes())
        if number:
            _, file, line, becomes = bugs()[number - 1]
            path = Path(folder, file)
            path.write_text(path.read_text().replace(line, becomes, 1))
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", f"test_ipo.py::{name}"]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def check_14(answer):
    """20 min: Make DPO's gradient vanish

    What moves the policy is the slope of the loss in h. At which h is DPO's slope 0, if p = .9? At p = 1 it
    never is: at which h has it fallen to a thousandth of what it was at step 0? Both in tau. What is IPO's
    slope there?

    See it: python ipo.py --loss dpo --data deterministic --tau 1 --steps 300, then 3000: loss, h, and the
    largest log-ratio (row ratio). The loss says that little is left to learn, and the policy runs on: the
    slope is small, but always of the same sign.

    Hints
      slope: at tau {tau}, p = {p} the slope at your h = {h:.4g} is {left:.4f} of that at h = 0; ipo.py says
        what the slope is, and torch.autograd agrees
    """
    for tau in (0.1, 0.5, 1.0):
        for p, due, h in zip((0.9, 1.0), (0.0, 0.001), tensor(answer(scalar(tau)), 2)):
            both = torch.stack([scalar(0.0), h]).requires_grad_()
            start, there = torch.autograd.grad(ipo.dpo_loss(both, scalar(p), tau).sum(), both)[0]
            need(abs(there / start - due) < 2e-5, "slope", tau=tau, p=p, h=h, left=there / start)


def check_15(answer):
    """20 min: Take the reference away

    In train, give zeros to margin in place of ref_logp. Which line of the core stops the run, and what does
    it say? With it out of the way: where does IPO end without its reference, mu uniform, p[y][y'] =
    p*(y>y')? (ref = .9, .1, the second always preferred, tau 1: with the reference pi(second) is .155. And
    without?)

    See it: python ipo.py in a copy of the folder

    Hints
      ref: that is pi*, as with the reference; h is now log pi(yw) - log pi(yl)
      value: not at tau {tau} (yours sum to {sum:.4f}): which differences of log pi, not of log pi/ref, does
        the loss ask for? And p[y][y'] says that y beats y'
    """
    for ref, p, tau in problems():
        pi = tensor(answer(ref, p, tau), 5)
        need(not torch.allclose(pi, optimum(ref, p, tau), atol=1e-4), "ref")
        need(torch.allclose(pi, optimum(0 * ref + 0.2, p, tau), atol=1e-4), "value", tau=tau, sum=pi.sum())


def check_16(answer):
    """45 min: The optimum of the mean form

    With --logp mean, h is the difference of log-ratio(y) / |y| between two responses, log-ratio(y) = log
    pi/ref of the whole response, |y| its number of tokens. Where does IPO end? g(y) = E_{y'~mu} p*(y>y').
    Some lines of bisection find the one number that makes pi sum to 1.

    See it: python -m lab.paper.mean_form

    Hints
      sum: the probabilities sum to {sum:.4f}
      score: not at tau {tau}: h is a difference of two scores, and at the minimum scores are known up to
        one number that all responses share. Which scores, and what becomes of that number in log pi?
    """
    length = scalar([1.0, 2.0, 3.0, 5.0, 7.0])
    for ref, p, tau in problems():
        pi = tensor(answer(ref, p.mean(1), length, tau), 5)
        score = (pi / ref).log() / length - p.mean(1) / tau
        need(near(pi.sum(), 1), "sum", sum=pi.sum())
        need(score.max() - score.min() < 1e-3, "score", tau=tau)


def check_17(answer):
    """60 min: Draw the pairs from the policy

    ipo.train takes any iterator of batches. Write a generator that yields for ever: a data.Batch of
    args.batch_size pairs of responses, to prompts in turn or at random, both drawn, independently, from the
    policy as it is by then, labelled by p*; and the reference's log-probs (2B,) of their rows. A label is a
    coin flip (winner first, p = 1) or p* itself; pairs of equals may be drawn again.
    source.enumerate(policy) is log pi (X,Y), source.pstar p* (X,Y,Y), row x * Y + y of source.pairs is
    prompt x with response y, source.pairs.padded(rows) -> tokens, mask, and ref_logp[rows] the reference.

    See it: python - <<END
    import ipo, lab.course.exercises
    class Online(ipo.WorldSource):
        def pose(self, policy, ref_logp, generator):
            super().pose(policy, ref_logp, generator)
            self.policy = policy
    def online(source, ref_logp, args, generator):
        return lab.course.exercises.answer_17(source, source.policy, ref_logp, args)
    ipo.offline = online
    args = ipo.parse(["--data", "deterministic", "--device", "cpu", "--out", "out/online", "--overwrite"])
    ipo.run(args, source=Online(args))
    END
    kl_opt does not go to 0, and should not: exercise 18. python -m lab.methods.online has the picture.

    Hints
      rows: tokens and mask are to hold 2 x args.batch_size rows, each a response of
        this world to one of its prompts
      ref: ref_logp is not what the reference gives these rows, chosen first, then rejected
      prompt: chosen and rejected must answer the same prompt
      policy: in batches {first} to {last} the pairs are {off:.2f} (in total variation) from independent
        draws from the policy. They are to follow the policy as it is by then; here it changes after batch 5
      label: the pairs are right, but not who is preferred: {off:.2f} (in total variation) from p*
    """
    with mock.patch.dict(data.WORLDS, exercise=(["good", "dull", "hot"], 1)):
        args = ipo.parse(["--data", "exercise", "--batch_size", "2000", "--device", "cpu"])
        source = ipo.WorldSource(args)
    policy = model.GPT(model.GPTConfig(*source.sizes, 1, 1, 8))
    ref_logp = torch.arange(16.0)
    batches = answer(source, policy, ref_logp, args)
    for first in (1, 6):
        for weight in policy.parameters():
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(first))
        seen = sum(count(next(batches), source, ref_logp) for _ in range(5))
        pi = source.enumerate(policy).exp()
        due = pi[:, :, None] * pi[:, None, :] * source.pstar
        off = apart(seen + seen.mT, due + due.mT)
        need(off < 0.08, "policy", off=off, first=first, last=first + 4)
        need(apart(seen, due) < 0.08, "label", off=apart(seen, due))


def count(item, source, ref_logp):  # -> (X,Y,Y): how often y is said to be preferred to y'
    batch, ref = item
    known, response = source.pairs.padded(torch.arange(16))
    same = (batch.tokens[:, None] == known).all(2)
    rows = same.int().argmax(1)
    need(len(rows) == 4000 and same.any(1).all() and torch.equal(batch.mask.bool(), response[rows]), "rows")
    need(torch.equal(ref, ref_logp[rows]), "ref")
    (x, y), (other, lost) = ((half // 4, half % 4) for half in rows.chunk(2))
    need(torch.equal(x, other), "prompt")
    seen = torch.zeros(4, 4, 4, dtype=torch.float64)
    seen.index_put_((x, y, lost), batch.p.double(), accumulate=True)
    return seen.index_put_((x, lost, y), 1 - batch.p.double(), accumulate=True)


def apart(seen, due):  # (X,Y,Y), (X,Y,Y) -> ()
    """Total variation between distributions of pairs, pairs of equals left out."""
    unequal = 1 - torch.eye(4, dtype=torch.float64)
    shares = [part / part.sum((1, 2), keepdim=True).clamp(1e-9) for part in (seen * unequal, due * unequal)]
    return (shares[0] - shares[1]).abs().sum((1, 2)).mean() / 2


def check_18(answer):
    """45 min: Where online IPO ends

    If both responses are drawn from the policy, mu is pi itself, and moves with it. Write down the equation
    that the end of such a run solves; then solve it by iteration, for one prompt, p[y][y'] = p*(y>y'), ref
    (Y,).

    See it: python -m lab.methods.online, python -m lab.common.exact --data deterministic

    Hints
      offline: that is the optimum for uniform mu; what is mu now?
      fixed: at tau {tau} the optimum against your pi (its sum: {sum:.4f}) is not your pi: {off:.2g} apart.
        If an iteration swings to and fro, go a part of the way only
    """
    for ref, p, tau in problems():
        pi = tensor(answer(ref, p, tau), 5)
        need(not torch.allclose(pi, optimum(ref, p, tau), atol=1e-4), "offline")
        off = (optimum(ref, p, tau, mu=pi) - pi).abs().max()
        need(off < 1e-4, "fixed", tau=tau, off=off, sum=pi.sum())


def check_19(answer):
    """20 min: RLOO's baseline

    RLHF by REINFORCE weighs the gradient of log pi(y) of each of k samples to a prompt by its reward minus
    a baseline. RLOO's baseline is the mean reward of the k - 1 others: it does not depend on y, so it
    changes noise alone, not what is expected. Write the k weights of each prompt, as numbers: no gradient
    may flow through them.

    See it: python -m lab.methods.rlhf. What would the mean of all k change, and a gradient through a KL in the
    reward?

    Hints
      value: the first sample of the first prompt weighs {weight:.3f}, not {due:.3f}; its baseline is made
        of the others alone, and nothing is divided by a deviation
      gradient: the numbers are right, but a gradient flows through them
    """
    reward = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    weight = tensor(answer(reward.requires_grad_()), 3, 4)
    due = reward[:, 0] - reward[:, 1:].mean(1)
    need(torch.allclose(weight[:, 0], due, rtol=1e-4), "value", weight=weight[0, 0], due=due[0])
    need(not weight.requires_grad, "gradient")


# -------------------------------------------------------------------------------------------- the program

CHECKS = {n: globals()[f"check_{n:02}"] for n in range(1, 20)}
PSI = (4, 5, 7)  # answered between the banners


def parts(n):
    """(minutes, title, question, hints by name) of an exercise, from the docstring of its check."""
    head, _, rest = inspect.cleandoc(CHECKS[n].__doc__).partition("\n\n")
    question, _, hints = rest.partition("\n\nHints\n")
    minutes, title = head.split(" min: ")
    return int(minutes), title, question, dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", hints, re.M))


def written(n):
    """The answer that stands there."""
    return getattr(ipo, f"psi_{n}", ipo.psi) if n in PSI else globals()[f"answer_{n:02}"]


def grade(n, answer):
    """("solved", "open" or "wrong", hint). A check sees the paper's psi, whatever stands in ipo.py."""
    def ask(*question):
        value = answer(*(x.clone() if isinstance(x, torch.Tensor) else x for x in question))
        need(value is not None, "open")
        return value

    try:
        with mock.patch.object(ipo, "psi", identity):
            CHECKS[n](ask)
        return "solved", ""
    except Wrong as wrong:
        hint, numbers = wrong.args
        text = parts(n)[3].get(hint)
        hint = text.format(**numbers) if text else hint
        return ("open", "") if hint == "open" else ("wrong", re.sub(r"\s+", " ", hint))
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"line {f.lineno}" for f in frames if f.name.startswith(("answer_", "psi", "<lambda>"))]
        return "wrong", f"{['what it returns', *where][-1]}: {type(error).__name__}: {error}"


def grades():
    """Of all. One psi does not answer three exercises: if it answers one, the others are open."""
    result = {n: grade(n, written(n)) for n in CHECKS}
    shared = [n for n in PSI if not hasattr(ipo, f"psi_{n}")]
    if any(result[n][0] == "solved" for n in shared):
        result |= {n: ("open", "") for n in shared if result[n][0] == "wrong"}
    return result


def show(n):
    """An exercise, and what is to be said of its answer."""
    minutes, title, question, _ = parts(n)
    print(f"{n}. {title} ({minutes} minutes)\n\n{question}\n")
    place = "ipo.py, psi" if n in PSI else f"lab/course/exercises.py, answer_{n:02}"
    state, hint = grade(n, written(n))
    print(f"{place}: {state}{'. Hint: ' * bool(hint)}{hint}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("number", nargs="?", default="list", help="an exercise [the list of all]")
    number = parser.parse_args(argv).number
    if number == "list":
        for n, (state, _) in grades().items():
            print(f"{n:3} {parts(n)[0]:4} min  {parts(n)[1]:34} {state}")
    elif number in map(str, CHECKS):
        show(int(number))
    else:
        parser.exit(2, f"exercises: {number} is none; give a number from 1 to {len(CHECKS)}\n")


if __name__ == "__main__":
    main()
