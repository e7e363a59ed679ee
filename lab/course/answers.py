"""Write your answers here: each in place of its line that says open, in as many lines as you like.

data, ipo, math and torch may be used. Numbers come as tensors (), float64, and answers may be plain numbers.
The answers to 4, 5 and 7 are psi, between the banners of ipo.py. This is no program; python -m lab.course 7
asks question 7 and looks at what stands here.
"""
import data  # noqa: F401
import ipo  # noqa: F401
import math  # noqa: F401
import torch  # noqa: F401


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


def answer_16(ref, g, length, tau):  # (Y,), (Y,), (Y,), () -> pi (Y,)
    return None  # open


def answer_17(source, policy, args):  # yields args.steps times a data.Batch of args.batch_size pairs
    return None  # open


def answer_18(ref, p, tau):  # (Y,), (Y,Y), () -> pi (Y,)
    return None  # open
