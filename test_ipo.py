"""Claims about nanoIPO, each with its proof or oracle.

  pytest -q                            all of them, in about three minutes on two cores
  pytest -q -rs -k exercise            the exercises of the README, with hints; answers go into ANSWERS below
  python test_ipo.py [NAME ...]        measures the README's tables anew, in full (all: an hour), and shows what differs

Oracles: enumeration of all responses, closed forms, an independent numpy implementation, Hugging Face's GPT-2. All tests but
the exercises run with the paper's Psi(q) = q, or one of their own, whatever a student has made of `psi` in ipo.py.
"""
import collections
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test goes online

import data as D
import ipo
import model as M

HERE = pathlib.Path(__file__).parent

# ========================= EXERCISES (README): your answers; `pytest -q -rs -k exercise` checks them =========================
ANSWERS = {  # None: skipped. A Psi takes a tensor; ipo.psi is what you wrote between the banners
    "01": None,  # lambda tau: IPO's loss at step 0 if all pairs are certain, nats^2
    "02": None,  # (by what factor halving tau multiplies the target, the loss at step 0, KL(pi*||ref) in `bt` from tau 0.2 to 0.1)
    "03": None,  # lambda tau: the p at which Psi = logit asks for a margin of 10 nats
    "04": None,  # lambda q: a Psi that never falls, is neither affine nor quadratic, and has the identity's targets
    "05": None,  # lambda q: the majority's Psi: 1 for every p above 1/2, 0 below, 1/2 for a tie
    "06": None,  # lambda psi, p, tau: the margin that hard labels ask for, on average over their coin flips; psi(torch.ones(1)) is psi's value at 1
    "07": None,  # lambda q: a Psi that never falls, whose target is 0 where 0.4 <= p <= 0.6 and from there linear up to 1/(2 tau) at 1
    "08": None,  # 3 x 3 p*, a > b > c > a (each > 1/2), with pi*(a) > 0.75 at tau 0.1 for uniform mu and ref
    "09": None,  # lambda tau, L: the tau with which the mean form has the sum form's minimiser, if all responses have L tokens
    "10": None,  # lambda tau: [pi(a), pi(b), pi(c)] at IPO's optimum on d1
    "12": None,  # the name in PSI whose pi* in `bt` is the same for every mu (exercise 11 and the rest of 12 are lines of ipo.py)
    "13": {},    # {number of a silent bug in the README: name of a test that fails with it}
}
# ==================================================== END OF THE EXERCISES ====================================================

YOURS = ipo.psi  # what stands between the banners of ipo.py
identity = lambda q: q
# psi functions that are odd about 1/2 up to a constant, and finite on (0, 1)
ODD_PSI = {"identity": identity, "logit": torch.logit, "tanh": lambda q: torch.tanh(8 * (q - 0.5)), "cubic": lambda q: (2 * q - 1) ** 3}


@pytest.fixture(autouse=True)
def paper_psi(monkeypatch):
    """Psi(q) = q, whatever a student made of it."""
    monkeypatch.setattr(ipo, "psi", identity)


def tiny(seed=0, V=5, T=6, **sizes):
    """A GPT with weights large enough that no two tokens are equally likely."""
    torch.manual_seed(seed)
    model = M.GPT(M.GPTConfig(**{"block_size": T, "vocab_size": V, "n_layer": 2, "n_head": 2, "n_embd": 16} | sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def cli(*args, folder, process=False):
    """Runs the command line with the paper's psi in `folder`: in a process of its own or, to save its start, in this one."""
    args = [str(a) for a in args]
    if process:
        code = "import sys, ipo; ipo.psi = lambda q: q; sys.exit(ipo.main())"
        return subprocess.run([sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(HERE)})
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = ipo.main(args)
        except SystemExit as stop:
            status = stop.code
    read = lambda stream: stream.seek(0) or stream.read()
    return Namespace(returncode=status, stdout=read(out), stderr=read(err))


def options(**flags):
    """The arguments of a run in a world, as the command line would make them, on the CPU."""
    return Namespace(**{"task": "world", "loss": "ipo", "tau": 0.2, "psi": "yours", "label_noise": 0.1, "gamma": 0.1, "logp": "sum", "labels": "hard",
                        "noise": 0.0, "mu": "uniform", "batch_size": 256, "dtype": "float32", "device": "cpu", "log_every": 1, "accum": 1, "bench": False, "save_every": 0} | flags)


SHORT = "--steps 20 --pairs 2000 --sft_steps 5 --batch_size 32 --log_every 10".split()

# ------------------------------------------------------------------------------------------------- target and losses


def test_ipo_loss_is_zero_exactly_at_the_target(paper_psi):
    """Eq. 17: (h - 1/(2 tau))^2."""
    h, p = torch.tensor([5.0, 0.0, 10.0]), torch.ones(3)
    assert ipo.ipo_loss(h, p, 0.1).tolist() == pytest.approx([0, 25, 25])


@pytest.mark.parametrize("p, expected", [(0.5, 0), (0.6, 1), (0.75, 2.5), (0.9, 4), (0.99, 4.9), (1, 5), (0, -5)])
def test_target_of_the_identity(paper_psi, p, expected):
    """(p - 1/2)/tau at tau = 0.1."""
    assert ipo.target(torch.tensor([p]), 0.1).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name, p, expected", [("logit", 0.6, 4.05), ("logit", 0.9, 21.97), ("logit", 0.99, 45.95), ("logit", 1, math.inf),
                                               ("tanh", 0.6, 6.64), ("tanh", 0.75, 9.64), ("tanh", 1, 9.99)])
def test_target_of_other_psis(monkeypatch, name, p, expected):
    """Logit asks for an infinite margin on a certain pair (DPO's over-fitting); a bounded Psi does not. Over 2 tau = 0.2."""
    monkeypatch.setattr(ipo, "psi", ODD_PSI[name])
    assert ipo.target(torch.tensor([p], dtype=torch.float64), 0.1).item() == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize("psi", [*ODD_PSI.values(), torch.square, torch.sqrt])
def test_target_is_odd_whatever_psi(monkeypatch, psi):
    """target(p) = -target(1-p): swapping the responses and their probability is the same statement."""
    monkeypatch.setattr(ipo, "psi", psi)
    p = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    assert torch.allclose(ipo.target(p, 0.3), -ipo.target(1 - p, 0.3))


def test_a_coin_flip_has_the_same_gradient_as_its_probability(paper_psi):
    """E_I[(h - target(I))^2] and (h - target(p))^2 differ by a constant when Psi is affine; so do 1/tau and 0 against 1/(2 tau)."""
    h, p, tau = torch.linspace(-9, 9, 7), torch.tensor(0.8), 0.1
    coin = p * ipo.ipo_loss(h, torch.ones(7), tau) + (1 - p) * ipo.ipo_loss(h, torch.zeros(7), tau)
    assert (coin - ipo.ipo_loss(h, p.expand(7), tau)).std() < 1e-4
    assert (((h - 1 / tau) ** 2 + h**2) / 2 - ipo.ipo_loss(h, torch.ones(7), tau)).std() < 1e-4


@pytest.mark.parametrize("name, slope", [("ipo", lambda h, p, tau: 2 * (h - (p - 0.5) / tau)), ("dpo", lambda h, p, tau: -tau * (p - 1 / (1 + math.exp(-tau * h))))])
@pytest.mark.parametrize("h, p, tau", [*itertools.product([-3.0, 0.0, 100.0], [0.0, 0.3, 1.0], [0.1, 1.0])])
def test_gradient_of_each_loss(paper_psi, name, slope, h, p, tau):
    """Closed forms; at h = 0, p = 1 they are -1/tau (IPO) and -tau/2 (DPO), at h = 100 IPO pulls back with +190."""
    x = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    ipo.LOSSES[name](x, torch.tensor([p], dtype=torch.float64), tau).sum().backward()
    assert x.grad.item() == pytest.approx(slope(h, p, tau), rel=1e-9, abs=1e-12)


def test_losses_against_numpy(paper_psi):
    """An implementation that shares nothing with ours."""
    rng = np.random.default_rng(0)
    h, p, tau = rng.normal(0, 3, 50), rng.random(50), 0.3
    ours = lambda f: f(torch.tensor(h), torch.tensor(p), tau).numpy()
    assert np.allclose(ours(ipo.ipo_loss), (h - (2 * p - 1) / (2 * tau)) ** 2)
    assert np.allclose(ours(ipo.dpo_loss), p * np.logaddexp(0, -tau * h) + (1 - p) * np.logaddexp(0, tau * h))


@pytest.mark.parametrize("tau", [0, -1, math.nan])
def test_tau_must_be_positive(tau):
    for loss in ipo.LOSSES.values():
        with pytest.raises(ValueError, match="tau must be > 0"):
            loss(torch.zeros(1), torch.ones(1), tau)


def test_the_parity_fixture(paper_psi):
    """What other tools are compared on: token log-ratios of one pair, tau = 0.1. The sum is the paper's; the mean is TRL's."""
    chosen, rejected = torch.tensor([0.5, 0.25, 0.25, 0]), torch.tensor([-0.2, -0.4])
    one = torch.ones(1)
    for reduce, ipo_value, dpo_value in ((torch.sum, 11.56, 0.616344), (torch.mean, 19.8025, 0.666)):
        h = ipo.margin(torch.stack([reduce(chosen), reduce(rejected)]), torch.zeros(2))
        assert ipo.ipo_loss(h, one, 0.1).item() == pytest.approx(ipo_value, rel=1e-5)
        assert ipo.dpo_loss(h, one, 0.1).item() == pytest.approx(dpo_value, abs=5e-4)


def test_margin_is_chosen_minus_rejected_and_needs_the_reference():
    """h = log pi(yw)/ref(yw) - log pi(yl)/ref(yl), chosen rows first."""
    assert ipo.margin(torch.tensor([1.0, 2, 3, 5]), torch.tensor([0.5, 0, 0, 0])).tolist() == [1 - 0.5 - 3, 2 - 5]


def test_adding_a_constant_to_both_log_ratios_changes_nothing():
    """Only differences are trained: that is why both log-probs may fall together."""
    logp = torch.randn(8)
    assert torch.allclose(ipo.margin(logp, torch.zeros(8)), ipo.margin(logp - 7, torch.zeros(8)), atol=1e-5)


@pytest.mark.parametrize("h, p, win", [([1.0, -1, 0, 1e-5], [1.0, 1, 1, 1], 0.5), ([2.0, 2], [0.9, 0.1], 0.5), ([-2.0], [0.1], 1.0)])
def test_win_counts_ties_one_half_and_reads_the_label(h, p, win):
    h = torch.tensor(h)
    n = ipo.measure(torch.cat([h, 0 * h]), 0 * torch.cat([h, h]), torch.tensor(p), 0.1, options(loss="dpo"))
    assert n["win"] == pytest.approx(win)


# --------------------------------------------------------------------------------------------------- log-probabilities


def test_sequence_logp_is_the_product_of_conditionals():
    """Brute force, token by token, with the plain forward pass; prompts of different lengths, padded rows."""
    model = tiny()
    tokens = torch.tensor([[1, 2, 3, 4, 0], [4, 3, 1, 0, 0], [2, 2, 2, 2, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    for row in range(3):
        expected, count = 0.0, 0
        for t in range(1, 5):
            if mask[row, t]:
                prob = model(tokens[row:row + 1, :t])[0, -1].softmax(-1)[tokens[row, t]]
                expected, count = expected + math.log(prob.item()), count + 1
        assert M.sequence_logp(model, tokens, mask)[row].item() == pytest.approx(expected, abs=1e-5)
        assert M.sequence_logp(model, tokens, mask, mean=True)[row].item() == pytest.approx(expected / count, abs=1e-5)


def test_probabilities_of_all_short_responses_sum_to_one():
    """Every string over {0..3} that ends with 4 (end of text), or is cut at three tokens: a partition of what can happen."""
    model, eot, prompt = tiny(), 4, [2, 1]
    responses = [[*r, eot] for k in range(3) for r in itertools.product(range(4), repeat=k)]
    responses += [list(r) for r in itertools.product(range(4), repeat=3)]
    T = len(prompt) + 3
    tokens = torch.tensor([prompt + r + [0] * (T - 2 - len(r)) for r in responses])
    mask = torch.tensor([[0] * 2 + [1] * len(r) + [0] * (T - 2 - len(r)) for r in responses])
    assert M.sequence_logp(model, tokens, mask).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_padding_never_changes_a_log_prob():
    model, tokens = tiny(), torch.tensor([[1, 2, 3]])
    mask = torch.tensor([[0, 1, 1]])
    for pad in range(5):
        longer = torch.cat([tokens, torch.full((1, 3), pad)], 1)
        more = torch.cat([mask, torch.zeros(1, 3, dtype=torch.int64)], 1)
        for mean in (False, True):
            assert torch.allclose(M.sequence_logp(model, longer, more, mean), M.sequence_logp(model, tokens, mask, mean), atol=1e-6)


@pytest.mark.parametrize("mask, words", [([[0, 0, 0]], "no response token"), ([[1, 1, 0]], r"mask\[:,0\]"), ([[0, 1]], "differ in shape")])
def test_sequence_logp_refuses_a_wrong_mask(mask, words):
    with pytest.raises(AssertionError, match=words):
        M.sequence_logp(tiny(), torch.tensor([[1, 2, 3]]), torch.tensor(mask))


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 1, "n_head": 4, "n_embd": 32}, {"vocab_size": 40, "block_size": 12}])
def test_gpt_is_gpt2(sizes):
    """Same names and shapes as Hugging Face's GPT2LMHeadModel (whose Conv1D weights are transposed), same logits and same
    gradient of a sequence's log-prob."""
    transformers = pytest.importorskip("transformers")
    ours = tiny(**sizes)
    c = ours.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer,
                                                                  n_head=c.n_head, n_embd=c.n_embd)).eval()
    state = {k: v.T if k.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and v.dim() == 2 else v for k, v in ours.state_dict().items()}
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["lm_head.weight"]
    tokens = torch.randint(c.vocab_size, (3, c.block_size))
    assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)
    scored = torch.ones_like(tokens)
    scored[:, 0] = 0
    M.sequence_logp(ours, tokens, scored).mean().backward()
    (-theirs(tokens, labels=tokens).loss * (c.block_size - 1)).backward()  # its loss is a mean over the tokens that follow
    assert torch.allclose(ours.transformer.wte.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-3)


def test_without_bias_there_is_none():
    assert not any("bias" in name for name, _ in tiny(bias=False).named_parameters())


def test_only_response_positions_go_through_the_head(monkeypatch):
    """The vocabulary's logits are by far the largest tensor; for positions that are not scored they are never made."""
    model, seen, head = tiny(), [], M.GPT.head
    monkeypatch.setattr(M.GPT, "head", lambda self, x: seen.append(x.shape) or head(self, x))
    M.sequence_logp(model, torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]]), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]]))
    assert seen == [(3, 16)]


def test_generate_samples_the_model():
    """Frequencies of 2,000 one-token samples against the softmax; temperature 0 is the mode; top_k 1 as well; eot ends."""
    model, prompt = tiny(), [1, 2]
    probs = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    g = torch.Generator().manual_seed(0)
    draws = [M.generate(model, prompt, 1, generator=g)[0] for _ in range(2000)]
    assert np.abs(np.bincount(draws, minlength=5) / 2000 - probs.detach().numpy()).max() < 0.035
    mode, g = int(probs.argmax()), torch.Generator().manual_seed(0)
    two = {M.generate(model, prompt, 1, top_k=2, generator=g)[0] for _ in range(100)}
    assert two == set(probs.topk(2).indices.tolist()) and M.generate(model, prompt, 1, temperature=1e-300) == [mode]
    assert M.generate(model, prompt, 1, temperature=0) == M.generate(model, prompt, 1, top_k=1) == [mode]
    assert M.generate(model, prompt, 1, temperature=0, eot=mode) == []
    assert len(M.generate(model, prompt, 99)) == model.config.block_size - len(prompt)


def test_bfloat16_scores_in_float32():
    """Log-probs leave autocast as float32 and lie within bfloat16's rounding of the exact ones."""
    model, tokens, mask = tiny(), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 1]])
    with M.autocast(model, "bfloat16"):
        low = M.sequence_logp(model, tokens, mask)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(M.sequence_logp(model, tokens, mask).item(), abs=0.1)


def test_checkpoint_returns_the_same_model(tmp_path):
    model = tiny()
    M.save_checkpoint(tmp_path / "a.pt", model, tokenizer="bytes")
    other, extra = M.load_checkpoint(tmp_path / "a.pt")
    assert extra == {"tokenizer": "bytes"} and other.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


# ------------------------------------------------------------------------------------------- the theorem, in a table


def tabular_minimiser(p, mu, tau):
    """argmin of E_{y,y'~mu} (f(y) - f(y') - target(p))^2 over free f, by least squares: log-ratios up to a constant, (Y,)."""
    pairs = list(itertools.product(range(len(mu)), repeat=2))
    weight = torch.stack([(mu[i] * mu[j]).sqrt() for i, j in pairs])
    signs = torch.stack([torch.eye(len(mu)).double()[i] - torch.eye(len(mu)).double()[j] for i, j in pairs])
    asked = torch.stack([ipo.target(p, tau)[i, j] for i, j in pairs])
    return torch.linalg.lstsq(weight[:, None] * signs, (weight * asked)[:, None], driver="gelsd").solution[:, 0]


def random_problem(seed):
    """Intransitive preferences over five responses, mu and ref unrelated."""
    g = torch.Generator().manual_seed(seed)
    upper = torch.rand(5, 5, generator=g, dtype=torch.float64) * 0.9 + 0.05
    p = torch.triu(upper, 1) + torch.tril(1 - upper.T, -1) + torch.eye(5, dtype=torch.float64) / 2
    mu, ref = (torch.rand(5, generator=g, dtype=torch.float64).softmax(0) for _ in range(2))
    assert any(p[a, b] > 0.5 and p[b, c] > 0.5 and p[c, a] > 0.5 for a, b, c in itertools.permutations(range(5), 3))
    return p, mu, ref


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ODD_PSI)
def test_every_odd_psi_reaches_the_psipo_optimum(monkeypatch, name, seed):
    """The minimiser of the squared-target loss is pi* = ref exp(g/tau), g = E_mu psi(p), also for cycles and mu != ref."""
    p, mu, ref = random_problem(seed)
    tau, psi = 0.5, ODD_PSI[name]
    monkeypatch.setattr(ipo, "psi", psi)
    minimiser = (ref.log() + tabular_minimiser(p, mu, tau)).softmax(0)
    best = D.optimum(ref.log()[None], p[None], mu[None], psi, tau)[0].exp()
    assert torch.allclose(minimiser, best, atol=1e-9)


def test_a_psi_that_is_not_odd_reaches_the_optimum_of_its_odd_part(monkeypatch):
    """q^2 is as good as q; sqrt is not sqrt but (sqrt(q) - sqrt(1-q))/2."""
    p, mu, ref = random_problem(0)
    best = lambda psi: D.optimum(ref.log()[None], p[None], mu[None], psi, 0.5)[0].exp()

    def fitted(psi):
        monkeypatch.setattr(ipo, "psi", psi)
        return (ref.log() + tabular_minimiser(p, mu, 0.5)).softmax(0)

    assert torch.allclose(fitted(torch.square), best(identity), atol=1e-9)
    assert torch.allclose(fitted(torch.sqrt), best(lambda q: (q.sqrt() - (1 - q).sqrt()) / 2), atol=1e-9)
    assert not torch.allclose(fitted(torch.sqrt), best(torch.sqrt), atol=1e-3)


def test_the_mean_form_has_another_optimum():
    """Divided by their lengths, log-ratios must still be those of a policy, so the free constant of the least squares is not
    free: the minimiser is ref exp(|y| (g/tau + c)) with c such that it sums to one. Gradient descent agrees; pi* differs."""
    (p, mu, ref), tau = random_problem(1), 0.5
    length, theta = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64), torch.zeros(5, dtype=torch.float64, requires_grad=True)
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        ratio = (theta.log_softmax(0) - ref.log()) / length
        value = (mu[i] * mu[j] * ipo.ipo_loss(ratio[i] - ratio[j], p[i, j], tau)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    fitted, g, low, high = theta.detach().softmax(0), (p * mu).sum(-1), -50.0, 50.0
    for _ in range(100):  # bisection for c
        c = (low + high) / 2
        low, high = (c, high) if (ref * (length * (g / tau + c)).exp()).sum() < 1 else (low, c)
    assert torch.allclose(fitted, ref * (length * (g / tau + c)).exp(), atol=1e-6)
    assert not torch.allclose(fitted, D.optimum(ref.log()[None], p[None], mu[None], identity, tau)[0].exp(), atol=0.05)


def test_without_a_reference_the_answer_is_another():
    """ref = (.9, .1), y2 preferred, tau = 1: pi*(y2) = sigmoid(log(1/9) + 1/2) = .155, without ref .622."""
    p, mu = torch.tensor([[0.5, 0], [1, 0.5]]).double()[None], torch.full((1, 2), 0.5).double()
    pi2 = lambda ref: D.optimum(torch.tensor([ref]).double().log(), p, mu, identity, 1.0).exp()[0, 1].item()
    assert pi2([0.9, 0.1]) == pytest.approx(0.155, abs=1e-3) and pi2([0.5, 0.5]) == pytest.approx(0.622, abs=1e-3)


@pytest.mark.parametrize("tau, expected", [(0.1, (0.964370, 0.034403, 0.001227)), (0.5, (0.562742, 0.288921, 0.148337)), (1.0, (0.448441, 0.321322, 0.230237))])
def test_the_papers_three_actions(tau, expected):
    """a > b > c, all certain, uniform mu and reference (section 5 of the paper)."""
    p = torch.tensor([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]).double()
    uniform = torch.full((1, 3), 1 / 3).double()
    assert D.optimum(uniform.log(), p[None], uniform, identity, tau).exp()[0].tolist() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- worlds


@pytest.mark.parametrize("name", D.WORLDS)
def test_worlds_are_what_they_say(name):
    """p* and its mirror sum to 1; mu's support is all that the model can emit; cyclic is intransitive, bt and deterministic not."""
    world = D.build_world(name)
    p = world.pstar
    assert torch.allclose(p + p.transpose(1, 2), torch.ones_like(p)) and world.base.sum().item() == pytest.approx(1)
    assert len(world.responses) == len(set(world.responses)) == (255 if name == "lengths" else 400)
    words = D.WORDS[world.tokenizer]
    short = [world.responses.index(f" {w}") for w in words]
    beats = p[0][short][:, short] > 0.5
    cycle = any(beats[a, b] and beats[b, c] and beats[c, a] for a, b, c in itertools.permutations(range(len(short)), 3))
    assert cycle == (name == "cyclic")
    if name in ("bt", "lengths"):
        reward = torch.tensor([[sum(D.VALENCE[w][x] for w in r.split()) for r in world.responses] for x in range(4)], dtype=torch.float64)
        assert torch.allclose(p, (reward[:, :, None] - reward[:, None, :]).sigmoid(), atol=1e-4)
    assert world.length[0].tolist() == [min(len(r.split()) + 1, D.MAX_WORDS[world.tokenizer]) for r in world.responses]
    if name == "deterministic":  # the same words in another order are worth the same: 1/2, whatever rounding their sums had
        sorted_words = [sorted(r.split()) for r in world.responses]
        same = torch.tensor([[a == b for b in sorted_words] for a in sorted_words])
        assert set(p.unique().tolist()) == {0, 0.5, 1} and (p[:, same] == 0.5).all()


def test_the_world_is_closed():
    """Any model of these sizes gives the 400 responses of each prompt a total probability of one; samples are among them."""
    world = D.build_world("bt")
    model = tiny(V=world.vocab_size, T=world.block_size, head_size=world.head_size)
    args = options()
    assert torch.allclose(ipo.distribution(model, world, args).exp().sum(-1), torch.ones(4).double(), atol=1e-5)
    tok = D.get_tokenizer("world")
    for _ in range(50):
        assert tok.decode(M.generate(model, tok.encode(world.prompts[1]), 64, eot=tok.eot_token)) in world.responses


@pytest.mark.parametrize("labels, noise", [("hard", 0.0), ("hard", 0.3), ("soft", 0.0)])
def test_pairs_are_drawn_as_described(labels, noise):
    """Never a pair of equals; responses from mu; hard labels agree with p* as often as p*, noise included, says."""
    world = D.build_world("bt")
    Y = 400
    mu = torch.rand(4, Y, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mu /= mu.sum(-1, keepdim=True)
    draw = lambda: world.draw(200_001, mu, labels, noise, torch.Generator().manual_seed(0))
    pairs, again = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(pairs, again)) and len(pairs.p) == 200_001
    x, a, b = pairs.prompt, pairs.chosen % Y, pairs.rejected % Y
    assert not (a == b).any() and torch.equal(pairs.chosen // Y, x) and torch.equal(pairs.rejected // Y, x)
    counts = torch.bincount(torch.cat([a, b])[torch.cat([x, x]) == 2], minlength=Y)
    assert (counts / counts.sum() - mu[2]).abs().max() < 1.5e-3
    if labels == "soft":
        assert torch.equal(pairs.p, world.pstar[x, a, b].float())
    else:
        up = world.pstar[x, torch.minimum(a, b), torch.maximum(a, b)]
        expected = (noise + (1 - 2 * noise) * up).mean()
        assert (pairs.p == 1).all() and (a < b).double().mean().item() == pytest.approx(expected.item(), abs=5e-3)


def random_policies(seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 400, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(3))


@pytest.mark.parametrize("name", ["bt", "deterministic", "cyclic"])
def test_the_gap_to_the_optimum_is_tau_times_the_kl(name):
    """J(pi*) - J(pi) = tau KL(pi||pi*) for every policy: the theorem that makes KL(pi||pi*) the right distance."""
    world, (pi, ref, mu), tau = D.build_world(name), random_policies(), 0.3
    best = D.optimum(ref, world.pstar, mu.exp(), identity, tau)
    number = lambda policy: D.exact(policy, ref, best, None, world.pstar, mu.exp(), identity, tau)
    assert number(best)["objective"] - number(pi)["objective"] == pytest.approx(tau * number(pi)["kl_opt"], rel=1e-9)
    assert number(best)["kl_opt"] == pytest.approx(0, abs=1e-12)


def test_exact_numbers_against_loops():
    """Win rate and KL by plain sums for one prompt."""
    world, (pi, ref, mu) = D.build_world("cyclic"), random_policies(1)
    one = world._replace(pstar=world.pstar[:1])
    n = D.exact(pi[:1], ref[:1], ref[:1], None, one.pstar, mu[:1].exp(), identity, 0.1)
    a, m, p = pi[0].exp().numpy(), mu[0].exp().numpy(), one.pstar[0].numpy()
    assert n["win"] == pytest.approx(sum(a[i] * m[j] * p[i, j] for i in range(400) for j in range(400)))
    assert n["kl_ref"] == pytest.approx(sum(a * (np.log(a) - ref[0].numpy())))


def test_theory_knows_where_labels_lead(monkeypatch):
    """Clean hard labels lead IPO to pi*; noise and a non-affine Psi do not, and the report's third policy says where instead:
    it is the tabular minimiser of the expected loss."""
    world, (_, ref, _) = D.build_world("bt"), random_policies()
    theory = lambda **kw: ipo.theory(world, ref, options(**kw))
    monkeypatch.setattr(ipo, "psi", identity)
    assert theory()[2] is None and theory(labels="soft")[2] is None and theory(loss="dpo")[2] is None
    assert torch.allclose(theory(mu="ref")[0], ref.exp()) and theory(mu="ref")[2] is None
    noisy = D.optimum(ref, world.pstar * 0.8 + 0.1, theory()[0], identity, 0.2)
    assert torch.allclose(theory(noise=0.1)[2], noisy)
    monkeypatch.setattr(ipo, "psi", lambda q: torch.tanh(8 * (q - 0.5)))
    flips = D.optimum(ref, world.pstar, theory()[0], lambda q: q * 2 * math.tanh(4), 0.2)
    assert theory(labels="soft")[2] is None and torch.allclose(theory()[2], flips, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- pairs from files


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def pair(chosen="good", rejected="bad", prompt="q: ", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def test_jsonl_is_read_as_written(tmp_path, capsys):
    """TRL's form, with and without p; Unicode of all kinds; keys that nothing reads are named."""
    text = "é 🙂 \u05d0 \x00"
    path = write(tmp_path / "a.jsonl", pair(), "", pair(text, p=0.25, score=1), "\ufeff" + json.dumps(pair(p=1)))
    assert list(D.read_jsonl(path)) == [D.Pair("q: ", "good", "bad", 1.0, f"{path}:1"), D.Pair("q: ", text, "bad", 0.25, f"{path}:3"),
                                  D.Pair("q: ", "good", "bad", 1.0, f"{path}:4")]
    out = capsys.readouterr().out
    assert "1 blank lines" in out and "'score' (1 lines)" in out


def test_anthropic_hh_is_cut_after_the_last_shared_turn(tmp_path):
    shared = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
    path = write(tmp_path / "hh.jsonl", {"chosen": shared + " so long", "rejected": shared + " so what\n\nHuman: ?\n\nAssistant: !"})
    assert [p[:4] for p in D.read_jsonl(path)] == [(shared, " so long", " so what\n\nHuman: ?\n\nAssistant: !", 1.0)]


BAD_LINES = {  # a line of a file -> what the message says after "file:line: "
    "{": "not JSON", "[1]": "a JSON list, not an object", "null": "a JSON NoneType", '{"a": 1}': "key 'chosen' is missing; add it (found: 'a')",
    '{"prompt": "q", "chosen": "a"}': "key 'rejected' is missing", json.dumps(pair(chosen=3)): "'chosen' is a JSON int; write a text, or a list of messages",
    json.dumps(pair(prompt=None)): "'prompt' is a JSON NoneType", json.dumps(pair(chosen=[{"role": "user"}])): "'chosen' holds \"{'role': 'user'}\", which is no message",
    json.dumps(pair(rejected="")): "'rejected' is empty", json.dumps(pair(p=1.5)): "'p' is '1.5'", json.dumps(pair(p="1")): "'p' is '1'",
    json.dumps(pair(p=True)): "'p' is 'True'", json.dumps(pair(p=math.nan)): "'p' is 'nan'", json.dumps(pair(p=-0.1)): "'p' is '-0.1'",
    json.dumps(pair(p=None)): "'p' is 'None'", '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}': "half a surrogate pair",
    '{"chosen": "a", "rejected": "b"}': "share no '\\n\\nAssistant:'", "[" * 100_000: "not JSON",
    '{"chosen": "\\n\\nAssistant:", "rejected": "\\n\\nAssistant: b"}': "'chosen' is empty", "9" * 5000: "not JSON",
    '{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}': "a key stands twice"}


@pytest.mark.parametrize("line, message", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_bad_jsonl_line_is_named_in_the_error(tmp_path, line, message):
    """One line, with file, line number, key and a remedy behind a semicolon."""
    path = write(tmp_path / "b.jsonl", pair(), line)
    with pytest.raises(D.Refused) as error:
        list(D.read_jsonl(path))
    text = str(error.value)
    assert text.startswith(f"{path}:2: ") and message in text and "\n" not in text and (";" in text or "from 0 to 1" in text)


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "l.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(D.Refused, match=r"l.jsonl:1: byte 13 is not UTF-8"):
        list(D.read_jsonl(str(tmp_path / "l.jsonl")))


@pytest.mark.parametrize("name", ["world", "bytes"])
def test_any_text_survives_our_tokenizers(name):
    """256 bytes make every text encodable; a world's bytes, and so its unknown words, lie beyond the model's vocabulary."""
    tok, text = D.get_tokenizer(name), "review of the sushi: é🙂 \x00 <|endoftext|>\n superbly"
    ids = tok.encode_ordinary(text)
    assert tok.decode(ids) == text and tok.eot_token not in ids
    assert name == "bytes" or max(ids) >= D.build_world("bt").vocab_size > max(tok.encode_ordinary("review of the beer: hot cold"))


def encoded(*pairs, block_size=32):
    return D.encode([D.Pair(**p) for p in pairs], D.get_tokenizer("bytes"), block_size)


def test_tokens_of_a_pair():
    """Prompt and response are encoded apart; the response ends with <|endoftext|>, which is scored; so is nothing else."""
    tok, data = D.get_tokenizer("bytes"), encoded(pair("ab", "c", "xyz"), pair("é", "<|endoftext|>", ""))
    tokens, mask, p, rows = data.batch(torch.tensor([0, 1]))
    scored = [tok.decode(t[m].tolist()) for t, m in zip(tokens, mask)]
    assert scored == ["ab<|endoftext|>", "é<|endoftext|>", "c<|endoftext|>", "<|endoftext|>" * 2]
    assert mask.sum(1).tolist() == [3, 3, 2, 14]  # what the text spelled out is 13 bytes, and no end of text
    assert [tok.decode(data.prompt_ids(r)) for r in rows.tolist()] == ["xyz", "<|endoftext|>"] * 2 and p.tolist() == [1, 1]
    assert tokens[0, :6].tolist() == tok.encode("xyzab") + [tok.eot_token] and mask[0, :6].tolist() == [False] * 3 + [True] * 3


def test_what_is_cut_and_dropped_is_counted(capsys):
    """Prompts are cut from the left and alike for both responses; responses never are."""
    data = encoded(pair("long" * 9), pair("same", "same"), pair("yes", "no", "0123456789" * 4), pair(prompt=""), pair(p=0.2))
    tokens, mask = data.rows(torch.arange(6))
    assert len(data.p) == 3 and tokens.shape[1] == 32
    assert tokens[0][~mask[0]].tolist()[:28] == tokens[1][~mask[1]].tolist()[:28] == D.get_tokenizer("bytes").encode("0123456789" * 4)[-28:]
    out = capsys.readouterr().out
    for note in ("the same tokens", "leave no room", "cut from the left", "empty prompts", "p < 1/2"):
        assert re.search(rf"data: 1 of 5 .*{re.escape(note)}", out)


def test_no_usable_pair_is_an_error():
    with pytest.raises(D.Refused, match="no usable pair among 1"):
        encoded(pair("a", "a"))


def test_held_out_prompts_are_never_trained_on():
    data = encoded(*(pair(f"a{i}", f"b{i}", f"q{i % 10}") for i in range(40)))
    train, held = D.split(data, 0.2, torch.Generator().manual_seed(0))
    assert len(held.p) == 8 and len(train.p) == 32 and not set(train.prompt.tolist()) & set(held.prompt.tolist())
    assert len(D.split(encoded(pair()), 0.9, torch.Generator())[0].p) == 1
    cut = encoded(*(pair("yes", "no", f"{i}" + "z" * 60) for i in range(5)))
    assert cut.prompt.tolist() == [0] * 5  # what is left of these prompts is the same, so they stay together


def test_batches_see_every_pair_once_an_epoch():
    order = torch.cat(list(D.batches(7, 3, 7, torch.Generator().manual_seed(0))))
    assert all(sorted(order[i:i + 7].tolist()) == list(range(7)) for i in (0, 7, 14))


# ------------------------------------------------------------------------------------------------------------ training


def reports(folder):
    report = json.loads((folder / "report.json").read_text())
    return report["before"], report["after"], report["optimum"]


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """(folder, what is printed) of `python ipo.py`, in full."""
    folder = tmp_path_factory.mktemp("default")
    run = cli("--out", "run", folder=folder, process=True)
    assert run.returncode == 0, run.stderr
    return folder, run


def test_training_brings_the_language_model_to_the_optimum(default_run):
    """The default run removes 98 % of the distance to pi*; the report is complete and consistent."""
    tmp_path, run = default_run
    before, after, best = reports(tmp_path / "run")
    assert before["kl_ref"] == pytest.approx(0, abs=1e-6) and after["kl_opt"] < before["kl_opt"] / 50 and best["kl_opt"] == 0
    assert best["objective"] - after["objective"] == pytest.approx(0.2 * after["kl_opt"], rel=1e-3)
    assert "step 0: loss 6.25, theory 6.25" in run.stdout and "probabilities sum to 1.000000" in run.stdout
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(200, 2001, 200)) and log[-1]["eval"]["kl_opt"] == after["kl_opt"]
    assert json.loads((tmp_path / "run/config.json").read_text())["tau"] == 0.2
    model, extra = M.load_checkpoint(tmp_path / "run/ckpt.pt")
    ref, _ = M.load_checkpoint(tmp_path / "run/ref.pt")
    world, args = D.build_world("bt"), options()
    pi, pi0 = (ipo.distribution(m, world, args) for m in (model, ref))
    assert (pi.exp() * (pi - pi0)).sum(-1).mean().item() == pytest.approx(after["kl_ref"], rel=1e-3)
    said = cli("--sample", "review of the pizza:", "--out", "run", folder=tmp_path)
    assert said.returncode == 0 and said.stdout.strip().removeprefix("review of the pizza:") in world.responses
    lost = cli("--sample", "review of the sushi:", "--out", "run", folder=tmp_path)
    assert lost.returncode == 2 and "outside this model's vocabulary" in lost.stderr and lost.stderr.count("\n") == 1


def test_in_the_deterministic_world_dpo_never_stops(tmp_path):
    """Certain preferences: DPO's log-ratios grow with the number of steps and no optimum exists; IPO's is finite."""
    for loss, steps in (("dpo", 50), ("dpo", 250), ("ipo", 250)):
        run = cli("--data", "deterministic", "--loss", loss, "--tau", 1, "--steps", steps, "--sft_steps", 30, "--out", f"{loss}{steps}", folder=tmp_path)
        assert run.returncode == 0, run.stderr
    (_, short, none), (_, long, _), (_, calm, best) = (reports(tmp_path / name) for name in ("dpo50", "dpo250", "ipo250"))
    assert long["kl_ref"] > short["kl_ref"] + 0.2 and long["ratio"] > 1.5 * short["ratio"] and none["ratio"] is None
    assert long["kl_ref"] < none["kl_ref"] == pytest.approx(6.5, abs=0.5)  # the limit: all on the best response, whose ref is e^-6.5 or so
    assert calm["kl_ref"] < 0.1 and calm["kl_opt"] < 0.02 and best["ratio"] < 1


PSIS_THAT_ARE_NONE = {"bool": lambda q: q > 0.5, "int": lambda q: (q > 0.5).int(), "raises": lambda q: 1 / 0, "nan": lambda q: (q - 0.5).sqrt(), "number": lambda q: 0.5, "numpy": lambda q: q.numpy(), "mean": lambda q: q.mean(), "nothing": lambda q: None,
                      "in place": lambda q: q.mul_(2)}


@pytest.mark.parametrize("name", PSIS_THAT_ARE_NONE)
def test_a_psi_that_is_no_function_of_a_tensor_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(ipo, "psi", PSIS_THAT_ARE_NONE[name])
    for more in ([], ["--labels", "soft"], ["--data", "d1"]):
        run = cli(*more, folder=tmp_path)
        says = {"raises": "raises ZeroDivisionError (division by zero)", "nan": "not a number at q = 0", "numpy": "psi in ipo.py"}
        assert run.returncode == 2 and says.get(name, "must return a tensor of numbers of q's shape") in run.stderr and run.stderr.count("\n") == 1


def test_a_psi_that_falls_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ipo, "psi", lambda q: 1 - q)
    assert "psi falls somewhere" in cli(*SHORT, folder=tmp_path).stdout
    assert "psi falls" not in cli("--overwrite", "--psi", "tanh", *SHORT, folder=tmp_path).stdout


def test_a_refused_grid_leaves_an_earlier_run_alone(tmp_path):
    """A file stands where a run's folder should be: nothing is written anywhere."""
    assert cli(*SHORT, "--loss", "ipo", "dpo", folder=tmp_path).returncode == 0
    kept = (tmp_path / "out/ipo-0.2/config.json").read_bytes(), (tmp_path / "out/config.json").read_bytes()
    (tmp_path / "out/slic-0.2").write_text("in the way")
    run = cli(*SHORT, "--loss", "ipo", "slic", "--seed", 7, "--overwrite", folder=tmp_path)
    assert run.returncode == 2 and "out/slic-0.2: File exists" in run.stderr and run.stderr.count("\n") == 1
    assert ((tmp_path / "out/ipo-0.2/config.json").read_bytes(), (tmp_path / "out/config.json").read_bytes()) == kept


def test_a_grid_whose_last_run_diverges_reports_the_others(tmp_path):
    run = cli(*SHORT, "--loss", "ipo", "exponential", "--tau", 1, 1e6, folder=tmp_path)
    assert run.returncode == 1 and "a --tau or --gamma nearer to 1" in run.stderr
    assert {"ipo-1", "ipo-1e+06", "exponential-1"} < json.loads((tmp_path / "out/report.json").read_text()).keys()


def test_a_bandit_whose_psi_is_not_odd_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ipo, "psi", torch.sqrt)
    run = cli("--data", "d3prime", "--steps", 20, "--seeds", 2, folder=tmp_path)
    assert "ipo, tau 0.1: this Psi is not odd about 1/2" in run.stdout


def test_a_bandit_that_diverges_stops(tmp_path):
    run = cli("--data", "d1", "--loss", "exponential", "--tau", 10, 1, "--lr", 1000, "--steps", 100, folder=tmp_path)
    assert run.returncode == 1 and "lower --lr" in run.stderr and run.stderr.count("\n") == 1 and not (tmp_path / "out/report.json").exists()


def test_pairs_cannot_be_drawn_from_a_reference_that_always_says_the_same():
    mu = torch.full((4, 400), 1e-9).double()
    mu[:, 7] = 1
    with pytest.raises(D.Refused, match="nearly always says the same"):
        D.build_world("bt").draw(10, mu, "hard", 0.0, torch.Generator())


def test_divergence_stops_the_run_and_keeps_what_was_saved(tmp_path):
    """Exit status 1 and one line that names step and pairs; nothing that is not finite is saved, and what was before stays."""
    for i, (flag, value) in enumerate([("--lr", "1e30"), ("--sft_lr", "1e30"), ("--lr", "1e10")]):  # 1e10: infinite logits
        run = cli(*SHORT, flag, value, "--out", f"o{i}", folder=tmp_path)
        assert run.returncode == 1 and f"lower {flag}" in run.stderr and run.stderr.count("\n") == 1, run.stderr
        assert not (tmp_path / f"o{i}/ckpt.pt").exists() and (tmp_path / f"o{i}/ref.pt").exists() == (flag == "--lr")
    lines = [pair(f"good {i}", f"bad {i}", f"question {i}?") for i in range(30)]
    path = write(tmp_path / "pairs.jsonl", "", *lines)  # pair i stands in line i + 2
    flags = ["--data", path, "--tokenizer", "bytes", "--holdout", 0, "--sft_steps", 1, "--steps", 20, "--batch_size", 4, "--save_every", 2]
    margin, calls = ipo.margin, []

    def poisoned(logp, ref):
        calls.append(1)
        return margin(logp, ref) * (math.nan if logp.requires_grad and sum(1 for c in calls) > 12 else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "margin", poisoned)
        run = cli(*flags, folder=tmp_path)
    step, rows = re.search(r"step (\d+): the loss or its gradient is not finite, on the pairs ([\d, ]+) \(lines of a file\)", run.stderr).groups()
    assert run.returncode == 1 and 2 < int(step) < 20 and len(rows.split(",")) == 4
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert state["step"] == (int(step) - 1) // 2 * 2 and all(w.isfinite().all() for w in state["model"].values())
    generator = torch.Generator().manual_seed(0)
    encoded = D.split(D.encode(D.read_jsonl(path), D.get_tokenizer("bytes"), 256), 0.0, generator)[0]
    generator.set_state(torch.load(tmp_path / "out/ref.pt", weights_only=True)["generator"])
    batch = list(D.batches(30, 4, 20, generator))[int(step) - 1]
    assert [int(r) for r in rows.split(",")] == encoded.line[batch].tolist() == (batch + 2).tolist()


def test_same_seed_same_weights(tmp_path):
    """Bit for bit; another seed differs."""
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli(*SHORT, "--seed", seed, "--out", name, folder=tmp_path).returncode == 0
        model, _ = M.load_checkpoint(tmp_path / name / "ckpt.pt")
        weights[name] = torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(weights["a"], weights["b"]) and not torch.equal(weights["a"], weights["c"])


@pytest.mark.parametrize("logp", ["sum", "mean"])
def test_the_reference_never_trains(logp):
    """The first batch has margin 0, in either form of log pi; the cache stays what it was while the policy moves away."""
    world, args = D.build_world("bt"), options(logp=logp, steps=3, lr=1e-2)
    model = tiny(V=world.vocab_size, T=world.block_size, head_size=world.head_size)
    ref = M.score(model, world.data, torch.arange(1600), 512, mean=logp == "mean")
    kept, seen = ref.clone(), []
    pairs = world.draw(96, torch.full((4, 400), 1 / 400).double(), "hard", 0.0, torch.Generator().manual_seed(0))
    order = D.batches(96, 32, 3, torch.Generator().manual_seed(0))
    ipo.train(model, pairs, ref, torch.full((96,), 0.2), order, args, lambda step, n: seen.append(n))
    assert torch.equal(ref, kept) and abs(seen[0]["h"]) < 1e-4 and seen[2]["h"] > 0.02
    assert seen[0]["loss"] == pytest.approx(ipo.ipo_loss(torch.zeros(1), torch.ones(1), 0.2).item(), rel=1e-4)
    assert not torch.allclose(M.score(model, world.data, torch.arange(1600), 512, mean=logp == "mean"), ref, atol=1e-2)


def test_the_reference_has_seen_chosen_and_rejected_alike(tmp_path):
    """SFT on both sides: neither is likelier at the start, so mu is what the reference says."""
    data = encoded(*(pair("aaaa", "bbbb", f"{i}") for i in range(20)))
    args = options(sft_steps=80, sft_lr=1e-2, batch_size=8, out=str(tmp_path))
    ipo.fit_reference(model := tiny(V=257, T=32), None, data, args, torch.Generator().manual_seed(0))
    logp = ipo.reference(model, data, torch.arange(40), args)
    assert (logp[data.chosen] - logp[data.rejected]).mean().abs() < 2 and logp.mean() > -8


def test_scoring_drops_nothing_out():
    model = tiny(V=257, T=32, dropout=0.5).train()
    data = encoded(pair(), pair("abc", "d"))
    expected = M.sequence_logp(model.eval(), *data.rows(torch.arange(4)))
    assert torch.allclose(M.score(model.train(), data, torch.arange(4), 3), expected, atol=1e-5)


def test_the_rows_of_a_pair_are_scored_together(monkeypatch):
    """In one batch they share their prompt; all chosen come first in `pair_rows`, so that must be arranged."""
    data, seen, rows = encoded(*(pair(prompt=f"question {i}? ") for i in range(6))), [], D.PairData.rows
    monkeypatch.setattr(D.PairData, "rows", lambda self, part: (seen.append(part.tolist()), rows(self, part))[1])
    scores = M.score(tiny(V=257, T=32), data, data.pair_rows(), 4)
    assert sorted(map(sorted, seen)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.allclose(scores, M.score(tiny(V=257, T=32), data, data.pair_rows(), 1), atol=1e-5)


def test_the_learning_rate_rises_and_falls_to_zero():
    """Under a constant gradient Adam moves by the learning rate: a third, two thirds, all of it, a half, for four steps."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.device = torch.device("cpu")
    (update, _), path = M.descent(model, 4, 0.1), [model.weight.item()]
    for _ in range(4):
        model.weight.sum().backward()
        update()
        path.append(model.weight.item())
    assert -np.diff(path) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.05], rel=1e-3)


def test_a_wrong_reference_stops_the_run():
    """Step 0 must have margin 0: a cache that another model made is found out."""
    world = D.build_world("bt")
    args = options(batch_size=32)
    model = tiny(V=world.vocab_size, T=world.block_size, head_size=world.head_size)
    ref = M.score(model, world.data, torch.arange(1600), 512)
    pairs = world.draw(32, torch.full((4, 400), 1 / 400).double(), "hard", 0.0, torch.Generator().manual_seed(0))
    ipo.check_start(model, pairs, ref, args)
    with pytest.raises(M.Stopped, match="the cached reference is not the policy"):
        ipo.check_start(tiny(1, V=world.vocab_size, T=world.block_size, head_size=world.head_size), pairs, ref, args)


def test_a_wrong_loss_stops_the_run(monkeypatch):
    """The loss of step 0 is compared with target^2, not with itself."""
    world, args = D.build_world("bt"), options(batch_size=32)
    model = tiny(V=world.vocab_size, T=world.block_size, head_size=world.head_size)
    pairs = world.draw(32, torch.full((4, 400), 1 / 400).double(), "hard", 0.0, torch.Generator().manual_seed(0))
    monkeypatch.setitem(ipo.LOSSES, "ipo", lambda h, p, tau, psi: ipo.ipo_loss(h, p, tau / 2, psi))
    with pytest.raises(M.Stopped, match="the loss is not theory's"):
        ipo.check_start(model, pairs, M.score(model, world.data, torch.arange(1600), 512), args)


def test_majority_psi_of_another_dtype_is_measured(monkeypatch):
    """(q > 1/2).float() is a natural edit; the exact numbers are float64 all the same."""
    world, (pi, ref, _) = D.build_world("bt"), random_policies()
    monkeypatch.setattr(ipo, "psi", lambda q: (q > 0.5).float())
    mu, best, _ = ipo.theory(world, ref, options(labels="soft"))
    assert D.exact(pi, ref, best, None, world.pstar, mu, ipo.psi, 0.2)["kl_opt"] > 0


def test_an_infinite_target_is_refused_with_the_lesson(monkeypatch):
    monkeypatch.setattr(ipo, "psi", torch.logit)
    args = options(tau=0.1)
    ipo.check_targets(torch.tensor([0.1, 0.9]), args)
    with pytest.raises(D.Refused, match="infinite margin on certain pairs is DPO's over-fitting; use labels"):
        ipo.check_targets(torch.tensor([0.1, 1.0]), args)


JSONL_RUN = "--tokenizer bytes --steps 6 --sft_steps 4 --batch_size 4 --n_layer 1 --n_embd 16 --block_size 64 --log_every 3".split()


def some_pairs(tmp_path, n=30):
    return write(tmp_path / "pairs.jsonl", *(pair(f"good {i}", f"bad {i}", f"question {i}?") for i in range(n)))


def test_a_file_of_pairs_trains_from_start_to_samples(tmp_path):
    """Held-out evaluation is labelled; --logp mean, bfloat16 and DPO run; a second run starts from the first's reference."""
    path = some_pairs(tmp_path)
    for more in ([], ["--logp", "mean"], ["--loss", "dpo", "--dtype", "bfloat16"], ["--holdout", 0]):
        run = cli("--data", path, *JSONL_RUN, *more, "--overwrite", folder=tmp_path)
        assert run.returncode == 0, run.stderr
        assert ("\neval     3/6 |" in run.stdout) == ("--holdout" not in more)
        assert ("\neval of the training pairs     3/6 |" in run.stdout) == ("--holdout" in more)
        assert f"step 0: loss {'0.693147, theory 0.693147' if 'dpo' in more else '25, theory 25'}" in run.stdout
    again = cli("--data", path, "--init_from", "out/ref.pt", "--steps", 6, "--batch_size", 4, "--out", "again", folder=tmp_path)
    assert again.returncode == 0 and "sft:" not in again.stdout, again.stderr
    kept = json.loads((tmp_path / "out/config.json").read_text())
    assert (kept["n_embd"], kept["block_size"], kept["tokenizer"]) == (16, 64, "bytes")
    assert cli("--sample", "question 1?", "--max_new_tokens", 5, folder=tmp_path).returncode == 0
    wrong = cli("--init_from", "out/ref.pt", "--out", "new", folder=tmp_path)
    assert wrong.returncode == 2 and "its model is for tokenizer 'bytes'" in wrong.stderr


BAD_COMMANDS = {  # arguments -> what the one line on standard error says
    "--tau 0": "--tau: '0' is not a number >= 1e-06 and <= 1e+06", "--tau nan": "--tau", "--tau inf": "--tau", "--steps 0": "--steps", "--steps 1.5": "'1.5' is not a whole number >= 1",
    "--loss kto": "invalid choice: 'kto'", "--noise 2": "--noise", "--holdout 0.1": "--holdout means nothing in a synthetic world",
    "--block_size 9": "--block_size means nothing", "--labels soft --noise 0.1": "--noise flips hard labels", "--n_embd 30": "not a multiple of",
    "--data nothing.jsonl": "nothing.jsonl: No such file", "--data .": ".: Is a directory", "--data empty.jsonl --tokenizer bytes": "empty.jsonl: holds no pair",
    "--data pairs.jsonl --noise 0.1": "--noise means nothing for a JSONL file", "--data same.jsonl --tokenizer bytes": "no usable pair among 1",
    "--data bad.jsonl --tokenizer bytes": "bad.jsonl:2: 'chosen' is empty", "--sample x --steps 3": "--steps means nothing with --sample",
    "--sample x": "out/ckpt.pt: No such file or directory; a finished run leaves a ckpt.pt in --out", "--sample x --out text": "text/ckpt.pt: ", "--init_from nothing.pt": "nothing.pt: No such file",
    "--init_from bad.jsonl": "bad.jsonl: not a nanoIPO checkpoint", "--init_from cut.pt": "cut.pt: not a nanoIPO checkpoint",
    "--init_from whole.pt --n_layer 2": "--n_layer is fixed by the checkpoint", "--init_from whole.pt": "its model is for tokenizer 'bytes'",
    "--data pairs.jsonl --init_from whole.pt --tokenizer bytes": "--tokenizer is fixed by the checkpoint",
    "--device cuda": "--device cuda: torch finds none", "--seed 18446744073709551616": "--seed", "--sft_steps 0 --sft_lr 1": "--sft_lr means nothing", "--out text/folder": "text/folder: Not a directory; name a folder that can be written", "--nonsense": "unrecognized arguments",
    "--tokenizer bytes": "--tokenizer means nothing in a synthetic world", "--batch_size 0": "--batch_size 0 means nothing in a synthetic world",
    "--psi tanh --loss dpo": "--psi means nothing without --loss ipo", "--gamma 1": "--gamma means nothing without --loss simpo",
    "--label_noise 0.1 --loss ipo dpo": "--label_noise means nothing without --loss robust", "--loss robust --label_noise 0.5": "--label_noise: '0.5'",
    "--loss simpo --logp mean": "--logp means nothing for --loss simpo", "--tau 1 2 --tau 1": "--tau 1 2 1: one value stands twice", "--out= --tau 1 2": "--out is empty",
    "--loss dpo dpo": "one value stands twice", "--tau 0.30000001 0.3": "--tau 0.3 0.3: one value stands twice", "--loss rebel": "--loss rebel: its target psi(1) - psi(0) is not finite",
    "--psi logit": "not finite", "--data deterministic --psi logit --labels soft": "not finite", "--psi sqrt": "invalid choice: 'sqrt'",
    "--data pairs.jsonl --tokenizer bytes --loss dpo rebel": "not finite", "--data d1 --psi logit": "not finite",
    "--data d1 --labels soft": "--labels means nothing in a bandit", "--data d1 --n_layer 2": "--n_layer means nothing in a bandit",
    "--data d1 --logp mean": "--logp means nothing in a bandit", "--data d1 --seeds 1": "--seeds: '1' is not a whole number >= 2",
    "--seeds 3": "--seeds means nothing in a synthetic world", "--data d1 --init_from whole.pt": "--init_from means nothing in a bandit",
    "--sample x --plot": "--plot means nothing with --sample", "--accum 300": "--accum 300: a batch of 256 pairs has not as many parts", "--data d1 --accum 2": "--accum means nothing in a bandit",
    "--sample x --top_p 0": "--top_p: '0' is not a number > 0 and <= 1", "--sample x --accum 2": "--accum means nothing with --sample", "--export x": "--export means nothing in a synthetic world",
    "--data pairs.jsonl --export x --loss ipo dpo": "--export names one folder for several runs",
    "--data pairs.jsonl --init_from folder": "--init_from folder: ", "--data d4": "d4: No such file"}


def test_bad_input_is_one_line_and_status_two(tmp_path, monkeypatch, capsys):
    """No traceback, nothing written. (In this process: a new one per row would take a minute.)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    some_pairs(tmp_path)
    write(tmp_path / "bad.jsonl", pair(), pair(""))
    write(tmp_path / "same.jsonl", pair("a", "a"))
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "text", "text")
    M.save_checkpoint(tmp_path / "whole.pt", tiny(), tokenizer="bytes")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:3000])
    before = {p.name for p in tmp_path.iterdir()}
    for command, message in BAD_COMMANDS.items():
        try:
            status = ipo.main(command.split())
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("ipo.py: ") and error.count("\n") == 1 and message in error, (command, error)
    assert {p.name for p in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------- the family of margin losses

OWN = {"robust": {"label_noise": 0.1}, "simpo": {"gamma": 0.1}}
FAMILY = {name: lambda h, p, tau, f=f, own=OWN.get(name, {}): f(h, p, tau, **own) for name, f in ipo.LOSSES.items()}
SLOPES = {  # at h = 0, p = 1, in units of tau, worked out by hand
    "dpo": -1 / 2, "slic": -1, "squared_hinge": -2, "exponential": -1, "savage": -1 / 4, "discopop": 5 * (1 - math.log(2)) - 3 / 4,
    "robust": -1 / 2 / (1 - 2 * 0.1), "exo": math.log(0.001 / 0.999) / 4, "simpo": -1 / (1 + math.exp(-0.1))}


@pytest.mark.parametrize("name", SLOPES)
def test_value_and_slope_of_each_loss_at_the_start(name):
    """At pi = ref; DiscoPOP's slope is +.784, so its first step moves away from the chosen response."""
    h, tau = torch.zeros(1, dtype=torch.float64, requires_grad=True), 0.3
    loss = FAMILY[name](h, torch.ones(1), tau).sum()
    loss.backward()
    assert h.grad.item() == pytest.approx(tau * SLOPES[name], rel=1e-5)
    due = {"simpo": math.log(1 + math.exp(0.1))} | ipo.START
    assert loss.item() == pytest.approx(due[name], rel=1e-5)
    assert ipo.START.keys() | {"ipo", "rebel", "simpo"} <= ipo.LOSSES.keys()


def test_discopop_golden_numbers():
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    FAMILY["discopop"](h, torch.ones(1), 1.0).sum().backward()
    assert FAMILY["discopop"](h, torch.ones(1), 1.0).item() == pytest.approx(0.8466, abs=1e-4) and h.grad.item() == pytest.approx(0.784, abs=1e-3)


NUMPY = {  # f(z) of a certain pair, written anew
    "dpo": lambda z: np.log1p(np.exp(-z)), "slic": lambda z: np.maximum(0, 1 - z), "squared_hinge": lambda z: np.maximum(0, 1 - z) ** 2,
    "exponential": lambda z: np.exp(-z), "savage": lambda z: (1 + np.exp(z)) ** -2.0,
    "discopop": lambda z: (1 - 1 / (1 + np.exp(-z / 0.05))) * np.log1p(np.exp(-z)) + np.exp(-z) / (1 + np.exp(-z / 0.05)),
    "robust": lambda z: (0.9 * np.log1p(np.exp(-z)) - 0.1 * np.log1p(np.exp(z))) / 0.8,
    "exo": lambda z: (lambda s: s * np.log(s / 0.999) + (1 - s) * np.log((1 - s) / 0.001))(1 / (1 + np.exp(-z))),
    "simpo": lambda z: np.log1p(np.exp(0.1 - z))}


@pytest.mark.parametrize("name", NUMPY)
def test_family_against_numpy(name):
    """p f(tau h) + (1-p) f(-tau h): linear in p, and swapping the responses with their probability changes nothing."""
    rng = np.random.default_rng(0)
    h, p, tau = rng.normal(0, 3, 50), rng.random(50), 0.7
    ours = FAMILY[name](torch.tensor(h), torch.tensor(p), tau)
    assert np.allclose(ours.numpy(), p * NUMPY[name](tau * h) + (1 - p) * NUMPY[name](-tau * h))
    assert torch.allclose(ours, FAMILY[name](torch.tensor(-h), torch.tensor(1 - p), tau))


def argmin(name, p):
    """The z that minimises the loss of a pair preferred with probability p, on a grid of 1/1000."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    return z[FAMILY[name](z, torch.tensor(p), 1.0).argmin()].item()


@pytest.mark.parametrize("p", [0.3, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("name", ["ipo", *ipo.LINK])
def test_population_link_of_each_loss(name, p):
    """argmin of p f(z) + (1-p) f(-z): logit p (DPO, Savage, REBEL), half of it (exponential), p - 1/2 (IPO), 2p - 1 (squared
    hinge), its sign (hinge), 6.9 (2p - 1) (EXO). A f is not a Psi, but this map is: it gives the margin that one pair asks for."""
    link = (lambda q: q - 0.5) if name == "ipo" else ipo.LINK[name]
    assert argmin(name, p) == pytest.approx(link(torch.tensor(p)).item(), abs=2e-3)
    assert argmin(name, p) == pytest.approx(ipo.target(torch.tensor(p), 1.0, link).item(), abs=2e-3)


def test_links_of_the_others():
    """Robust DPO: logit of the clean probability when labels flip as it assumes, more than logit when they do not. DiscoPOP: two
    wells at p = 1/2, log of the golden ratio from 0, so no link. SimPO: a root that is logit p only at gamma = 0."""
    clean, e = 0.75, 0.1
    assert argmin("robust", clean * (1 - e) + (1 - clean) * e) == pytest.approx(math.log(3), abs=2e-3)
    assert argmin("robust", clean) == pytest.approx(math.log(0.65 / 0.15), abs=2e-3)
    assert abs(argmin("discopop", 0.5)) == pytest.approx(math.log((1 + 5**0.5) / 2), abs=2e-3)
    k = math.exp(0.1)
    root = (k * 0.5 + (k**2 / 4 + 4 * 0.75 * 0.25) ** 0.5) / (2 * 0.25)
    assert argmin("simpo", 0.75) == pytest.approx(math.log(root), abs=2e-3) and abs(math.log(root) - math.log(3)) > 0.04


def test_every_loss_changes_the_weights_differently():
    """Three steps from the same start on the same soft pairs: no name is another's alias, and every extra argument counts."""
    world = D.build_world("bt")
    pairs = world.draw(96, torch.full((4, 400), 1 / 400).double(), "soft", 0.0, torch.Generator().manual_seed(0))
    weights = {}
    runs = [{"loss": name} for name in ipo.LOSSES] + [{"loss": "robust", "label_noise": 0.3}, {"loss": "simpo", "gamma": 1.0}]
    runs += [{"psi": name} for name in ipo.PSI if name not in ("yours", "identity", "logit")] + [{"loss": "dpo", "tau": 0.3}, {"tau": 0.3}]
    for run in runs:
        args = options(steps=3, lr=1e-2, **run)
        model = tiny(V=world.vocab_size, T=world.block_size, head_size=world.head_size)
        ref = M.score(model, world.data, torch.arange(1600), 512)
        ipo.train(model, pairs, ref, torch.full((96,), args.tau), D.batches(96, 32, 3, torch.Generator().manual_seed(0)), args, lambda *_: None)
        weights[str(run)] = torch.cat([p.detach().flatten() for p in model.parameters()])
    for a, b in itertools.combinations(weights, 2):
        assert (weights[a] - weights[b]).abs().max() > 1e-5, (a, b)


def test_psi_by_name_is_the_edited_psi(monkeypatch):
    """--psi tanh gives the weights that a student gets who writes tanh between the banners."""
    logs = []
    for psi, named in ((identity, "tanh"), (lambda q: torch.tanh(8 * (q - 0.5)), "yours")):
        monkeypatch.setattr(ipo, "psi", psi)
        logs.append(ipo.measure(torch.ones(6), torch.zeros(6), torch.tensor([0.6, 0.9, 1]), 0.2, options(psi=named)))
    assert logs[0] == logs[1] and logs[0]["target"] == pytest.approx(np.mean(np.tanh([0.8, 3.2, 4])) / 0.2)


# ------------------------------------------------------------------------------------------------ the paper's bandit

SECTION_5 = {  # data, tau -> exact IPO probabilities of a, b, c (the paper's section 5)
    **{("bandit2", t): (y, 1 - y) for t, y in ((0.1, 0.993307), (0.5, 0.731059), (1.0, 0.622459))},
    ("d1", 0.1): (0.964370, 0.034403, 0.001227), ("d1", 0.5): (0.562742, 0.288921, 0.148337), ("d1", 1.0): (0.448441, 0.321322, 0.230237),
    ("d3prime", 0.1): (0.498321, 0.498321, 0.003358), ("d3prime", 0.5): (0.422319, 0.422319, 0.155362), ("d3prime", 1.0): (0.383652, 0.383652, 0.232697),
    **{(d, t): (1 / 3, 1 / 3, 1 / 3) for d in ("d2", "d3") for t in (0.1, 0.5, 1.0)}}


@pytest.mark.parametrize("data, tau", SECTION_5)
def test_exact_optimum_of_each_bandit(data, tau):
    """Eq. 7 under uniform mu and reference gives the table; so does least squares on the pairs alone, without any mu."""
    world = D.build_bandit(data, 1)
    Y = len(world.responses)
    ref = torch.full((1, Y), 1 / Y).double().log()
    best = D.optimum(ref, world.pstar, ref.exp(), identity, tau).exp()[0]
    assert best.tolist() == pytest.approx(SECTION_5[data, tau], abs=1e-6)
    w, l = world.data.chosen, world.data.rejected
    signs = torch.eye(Y).double()[w] - torch.eye(Y).double()[l]
    fitted = torch.linalg.lstsq(signs, torch.full((len(w), 1), 1 / (2 * tau)).double(), driver="gelsd").solution[:, 0].softmax(0)
    assert torch.allclose(fitted, best, atol=1e-6)


@pytest.mark.parametrize("data, limit", [("d1", (1, 0, 0)), ("d2", (1 / 3, 1 / 3, 1 / 3)), ("d3", (1 / 3, 1 / 3, 1 / 3)), ("d3prime", (0.5, 0.5, 0)), ("bandit2", (1, 0))])
def test_dpo_tends_to_a_limit_on_certain_pairs(data, limit):
    """pi* of Psi = logit at p* clipped to [e, 1 - e] tends to what `optimum` calls the limit, as e falls."""
    world = D.build_bandit(data, 1)
    ref = torch.full((1, len(limit)), 1 / len(limit)).double().log()
    best = lambda psi: D.optimum(ref, world.pstar, ref.exp(), psi, 0.5).exp()[0].tolist()
    assert best(torch.logit) == pytest.approx(limit) and best(lambda q: torch.logit(q, eps=1e-30)) == pytest.approx(limit, abs=1e-9)


def test_the_limit_of_a_world_that_is_partly_certain():
    """Where two responses surely win equally often, what is finite of Psi decides between them."""
    p = torch.tensor([[0.5, 0.7, 1.0], [0.3, 0.5, 1.0], [0.0, 0.0, 0.5]]).double()[None]
    ref = torch.tensor([[0.2, 0.3, 0.5]]).double().log()
    best = D.optimum(ref, p, torch.full((1, 3), 1 / 3).double(), torch.logit, 0.5).exp()[0]
    odds = 0.2 / 0.3 * math.exp(2 * math.log(0.7 / 0.3) / 3 / 0.5)
    assert best.tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds), 0])


def test_the_table_is_a_policy():
    """Its log-probs come through the same sequence_logp, in float64: log softmax of its logits."""
    model = M.Table(2, 3)
    torch.nn.init.normal_(model.theta)
    world = D.build_bandit("d1", 2)
    logp = M.score(model, world.data, torch.arange(6), 4)
    assert logp.dtype == torch.float64 and torch.equal(logp.view(2, 3), model.theta.detach().log_softmax(-1))


def test_draws_are_with_replacement_and_per_policy():
    """As many pairs of every copy in each step, all equally likely; 0 gives every pair once."""
    data = D.build_bandit("d1", 4).data
    picked = torch.stack(list(D.draws(data, 9, 2000, torch.Generator().manual_seed(0)))).view(2000, 4, 9)
    assert torch.equal(data.prompt[picked], torch.arange(4)[None, :, None].expand(2000, 4, 9))
    assert (torch.bincount(picked.flatten()) / picked.numel() - 1 / 12).abs().max() < 3e-3
    assert not torch.equal(picked[:, 0] % 3, picked[:, 1] % 3) and all(len(set(row.tolist())) <= 3 for row in picked[:, 0])
    assert torch.equal(next(D.draws(data, 0, 1, torch.Generator())), torch.arange(12))


def test_the_loop_is_the_papers_protocol():
    """Mini-batches on two taus and two copies at once: the weights of plain Adam at a constant .01, written out with autograd.
    All pairs in each step: the rate falls to 0, so a margin that wants 5 nats moves half as far in the first 30 steps."""
    world, taus = D.build_bandit("d1", 4), torch.tensor([0.1, 0.1, 0.5, 0.5]).double().repeat_interleave(3)
    args = options(task="bandit", batch_size=9, steps=40, lr=0.01, log_every=100)
    model, ref = M.Table(4, 3), torch.full((12,), 1 / 3).double().log()
    ipo.train(model, world.data, ref, taus, D.draws(world.data, 9, 40, torch.Generator().manual_seed(0)), args, lambda *_: None)
    theta = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], 0.01)
    for index in D.draws(world.data, 9, 40, torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        w, l = (theta.flatten()[rows[index]] for rows in (world.data.chosen, world.data.rejected))
        ((w - l - 1 / (2 * taus[index])) ** 2).mean().backward()
        optimizer.step()
    assert torch.allclose(model.theta, theta, atol=1e-9) and theta.abs().max() > 0.2
    one, full = D.build_bandit("bandit2", 1), M.Table(1, 2)
    ipo.train(full, one.data, ref[:2], torch.tensor([0.1]).double(), D.draws(one.data, 0, 30, None), options(task="bandit", batch_size=0, steps=30, lr=0.01),
              lambda *_: None)
    assert full.theta[0, 0].item() == pytest.approx(30 * 0.01 / 2, rel=0.1)


@pytest.mark.parametrize("data", ["d1", "d3prime"])
def test_the_bandit_reaches_the_exact_optimum(tmp_path, data):
    """All pairs in every step: within 1e-6 of the exact optimum, for every action and tau (with a ninth of the default steps)."""
    run = cli("--data", data, "--batch_size", 0, "--seeds", 2, "--steps", 2000, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    for tau in (0.1, 0.5, 1.0):
        assert report[f"ipo-{tau:g}"]["after"]["pi"] == pytest.approx(SECTION_5[data, tau], abs=1.1e-6)
        assert report[f"ipo-{tau:g}"]["optimum"]["pi"] == pytest.approx(SECTION_5[data, tau], abs=1e-6)


def captured(monkeypatch):
    """What is drawn, instead of the files: {name: figure}."""
    figures = {}
    monkeypatch.setattr(ipo, "save_picture", lambda figure, path: figures.update({pathlib.Path(path).name: figure}))
    return figures


def test_the_papers_protocol_in_small(tmp_path, monkeypatch):
    """Mini-batches of 9, Adam at .01: IPO's mean of ten seeds is within .01 of the optimum, DPO is greedy at both taus; on the
    printed D3 nothing moves, since c is in no pair and the others balance."""
    figures = captured(monkeypatch)
    run = cli("--data", "d1", "--loss", "ipo", "dpo", "--tau", 0.1, 0.5, "--steps", 3000, "--log_every", 1500, "--plot", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    for tau in (0.1, 0.5):
        assert report[f"ipo-{tau:g}"]["after"]["pi"] == pytest.approx(SECTION_5["d1", tau], abs=0.01)
        assert report[f"dpo-{tau:g}"]["after"]["pi"][0] > 0.999 and report[f"dpo-{tau:g}"]["optimum"]["pi"] == [1, 0, 0]
        assert 1e-4 < max(report[f"ipo-{tau:g}"]["after"]["interval"]) < 8e-3  # seeds differ, and their mean is that sure
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["step"]) for line in lines[:4]] == [(["ipo", 0.1], 0), (["ipo", 0.1], 1500), (["ipo", 0.1], 3000), (["ipo", 0.5], 0)]
    assert lines[0]["eval"]["pi"] == pytest.approx([1 / 3] * 3) and lines[0]["target"] == pytest.approx(5)
    assert "step 0: loss 25, theory 25" in run.stdout and "ipo, tau 0.1: a" in run.stdout
    for axis in figures["actions.png"].axes:  # a row per tau, a column per loss: solid the means, dashed the optimum
        loss, tau = re.match(r"(\w+), tau (.*)", axis.get_title()).groups()
        curves, dashed = axis.lines[::2], axis.lines[1::2]
        assert [c.get_ydata()[-1].item() for c in curves] == pytest.approx(report[f"{loss}-{tau}"]["after"]["pi"])
        assert [d.get_ydata()[0] for d in dashed] == report[f"{loss}-{tau}"]["optimum"]["pi"]
    assert [a.get_title() for a in figures["actions.png"].axes] == ["ipo, tau 0.1", "dpo, tau 0.1", "ipo, tau 0.5", "dpo, tau 0.5"]
    still = cli("--data", "d3", "--tau", 0.5, "--steps", 50, "--batch_size", 0, "--overwrite", folder=tmp_path)
    assert still.returncode == 0 and json.loads((tmp_path / "out/report.json").read_text())["after"]["pi"] == pytest.approx([1 / 3] * 3)


# ------------------------------------------------------------------------------------------------- grids and pictures


def test_a_run_in_a_grid_is_the_run_alone(tmp_path):
    """Same reference, pairs and order: the report of each run is that of the same flags given alone, bit for bit."""
    for out, losses, taus in (("grid", ["dpo", "ipo", "simpo"], [1, 0.2]), ("ipo", ["ipo"], [0.2]), ("simpo", ["simpo"], [1])):
        run = cli(*SHORT, "--loss", *losses, "--tau", *taus, "--out", out, "--plot", folder=tmp_path)
        assert run.returncode == 0, run.stderr
    grid, ipo_alone, simpo_alone = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("grid", "ipo", "simpo"))
    assert all(-1e-3 < grid[name]["after"]["below"] < 0.1 for name in ("ipo-0.2", "dpo-1", "simpo-1"))
    assert grid["ipo-0.2"]["after"] == ipo_alone["after"] and grid["simpo-1"]["after"] == simpo_alone["after"]
    assert grid["dpo-1"]["before"]["kl_ref"] == pytest.approx(0, abs=1e-6) and grid["dpo-1"]["after"] != grid["dpo-0.2"]["after"]
    alone, in_grid = (M.load_checkpoint(tmp_path / out / "ckpt.pt")[0].state_dict() for out in ("ipo", "grid/ipo-0.2"))
    assert all(torch.equal(alone[k], in_grid[k]) for k in alone)
    lines = [json.loads(line) for line in (tmp_path / "grid/metrics.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines[::2]] == [["dpo", 1], ["dpo", 0.2], ["ipo", 1], ["ipo", 0.2], ["simpo", 1], ["simpo", 0.2]]
    simpo = next(line for line in lines if line["run"][0] == "simpo")
    assert -2.5 < simpo["chosen"] < -1 and abs(lines[0]["chosen"]) < 0.5  # a mean log-prob, since there is no reference to divide by
    assert json.loads((tmp_path / "grid/dpo-1/config.json").read_text())["tau"] == 1
    assert (tmp_path / "grid/runs.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_show_the_measured_numbers(tmp_path, monkeypatch):
    """Curves are the lines of metrics.jsonl from step 0 on, the dashed line is the target, the last points lie below the frontier."""
    figures = captured(monkeypatch)
    run = cli(*SHORT, "--loss", "ipo", "dpo", "--labels", "soft", "--psi", "tanh", "--plot", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    margin, kl, win = figures["runs.png"].axes
    curve = next(line for line in margin.lines if line.get_label() == "ipo, tau 0.2")
    assert list(curve.get_xdata()) == [0, 10, 20] and list(curve.get_ydata())[1:] == [line["eval"]["h"] for line in lines[:2]]
    heights = [line.get_ydata()[0] for line in margin.lines if list(line.get_xdata()) == [0, 1]]
    report = json.loads((tmp_path / "out/report.json").read_text())
    certain = pytest.approx(math.tanh(4) / 0.2)  # and infinite for DPO
    assert heights == [certain, report["ipo-0.2"]["optimum"]["h"], report["dpo-0.2"]["optimum"]["h"]]
    assert list(kl.lines[1].get_ydata())[-1] == lines[3]["eval"]["kl_ref"]
    frontier = win.lines[-1]
    assert [tuple(z[0] for z in line.get_data()) for line in win.lines if line.get_marker() == "o"] == [
        (line["eval"]["kl_ref"], line["eval"]["win"]) for line in (lines[1], lines[3])]
    for line in (lines[1], lines[3]):
        assert line["eval"]["win"] <= np.interp(line["eval"]["kl_ref"], *frontier.get_data()) + 1e-3
    psis = {line.get_label(): line for line in figures["psi.png"].axes[0].lines}
    assert psis.keys() == {*ipo.PSI, "reached: tanh"}
    assert np.allclose(psis["tanh"].get_ydata(), np.tanh(8 * (psis["tanh"].get_xdata() - 0.5)) / 0.2, atol=1e-4)


def test_the_mean_forms_fixed_point_in_a_world():
    """Normalised, with log-ratios per token equal to E_mu[target] up to a constant of the prompt; far from pi* at equal tau."""
    world = D.build_world("lengths")
    ref = torch.randn(4, 255, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    for psi in ("identity", "cubic"):
        mu, best, fit = ipo.theory(world, ref, options(logp="mean", labels="soft", mu="ref", psi=psi))
        left = (fit - ref) / world.length - (ipo.target(world.pstar, 0.2, ipo.PSI[psi]) * mu[:, None, :]).sum(-1)
        assert fit.logsumexp(-1).abs().max() < 1e-9 and left.std(-1).max() < 1e-9 and D.kl(fit, best) > 1


def test_expected_numbers_are_those_of_the_minimiser(tmp_path):
    """`expected at the end` is reached, in either form of log pi: loss and margin of the last steps lie around it."""
    for more in (["--logp", "mean"], []):
        run = cli("--data", "lengths", "--tau", 1, "--labels", "soft", "--pairs", 20000, "--steps", 150, "--log_every", 30, *more, "--overwrite", folder=tmp_path)
        due = float(re.search(r"expected at the end: loss +([\d.]+)", run.stdout)[1])
        lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
        assert np.mean([line["loss"] for line in lines[-3:]]) == pytest.approx(due, rel=0.35, abs=1e-4), run.stdout


def test_the_margin_of_a_policy_is_measured_on_the_pairs():
    """h by a loop over the pairs; None where pi* is a limit."""
    world, (pi, ref, _) = D.build_world("deterministic"), random_policies()
    pairs = world.draw(50, torch.full((4, 400), 1 / 400).double(), "hard", 0.0, torch.Generator().manual_seed(0))
    exact, ratio = ipo.solve(world, ref, pairs, options(loss="dpo")), (pi - ref).flatten()
    loop = lambda value: np.mean([(value[a] - value[b]).item() * (1 if p > 0.5 else -1) for a, b, p in zip(pairs.chosen, pairs.rejected, pairs.p)])
    assert exact.evaluate(pi)["h"] == pytest.approx(loop(ratio))
    assert exact.expected["optimum"]["h"] is None and exact.expected["optimum"]["kl_ref"] > 3
    pairs = pairs._replace(p=torch.rand(50))  # soft labels: towards the likelier response
    per_token = ipo.solve(world, ref, pairs, options(logp="mean", labels="soft")).evaluate(pi)["h"]
    assert per_token == pytest.approx(loop(ratio / world.length.flatten()))
    assert ipo.solve(world, ref, pairs, options(loss="simpo", logp="mean")).evaluate(pi)["h"] == pytest.approx(loop(pi.flatten() / world.length.flatten()))


@pytest.mark.parametrize("where", ["uniform", "ref"])
def test_no_policy_beats_the_frontier(where):
    """Random policies and the optima of other Psis lie on or below it; its own points have the win rate of their tau's pi*."""
    world, (pi, ref, _) = D.build_world("cyclic"), random_policies()
    args = options(mu=where)
    mu, points = ipo.theory(world, ref, args)[0], ipo.frontier(world, ref, args)
    assert torch.equal(mu, ref.exp() if where == "ref" else torch.full_like(ref, 1 / 400))
    kls, wins = zip(*points)
    assert list(kls) == sorted(kls) and kls[0] < 1e-6
    others = [pi, (0.7 * ref + 0.3 * pi).log_softmax(-1)] + [D.optimum(ref, world.pstar, mu, psi, tau) for psi in ODD_PSI.values() for tau in (0.1, 0.5, 3)]
    for other in others:
        n = D.exact(other, ref, ref, None, world.pstar, mu, identity, 1.0)
        if n["kl_ref"] < kls[-1]:
            assert n["win"] <= np.interp(n["kl_ref"], kls, wins) + 1e-4
    own = D.exact(D.optimum(ref, world.pstar, mu, identity, 0.5), ref, ref, None, world.pstar, mu, identity, 1.0)
    assert own["win"] == pytest.approx(np.interp(own["kl_ref"], kls, wins), abs=1e-4)


def test_the_nearest_sum_is_found():
    """pi* of tau = .5 is nearest to itself, for the Psi of the run."""
    world, (_, ref, _) = D.build_world("bt"), random_policies()
    for psi in ("identity", "logit"):
        best = D.optimum(ref, world.pstar, torch.full((4, 400), 1 / 400).double(), ipo.PSI[psi], 0.5)
        kl, tau = ipo.nearest(world, ref, best, options(psi=psi, logp="mean"))
        assert tau == pytest.approx(0.5, rel=0.02) and kl < 1e-3


def test_the_psi_card(tmp_path):
    """Targets of section 1 at tau = .1 before; with soft labels the margins of pi* and of the policy after."""
    run = cli(*SHORT, "--psi", "logit", "--labels", "soft", "--tau", 0.1, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"target\(p\), nats +(.*)", run.stdout) == ["0.00    4.05   10.99   21.97   45.95     inf"] * 2
    reached, due = (re.search(rf"{name} +(.*)", run.stdout)[1].split() for name in ("h reached", "h where labels lead"))
    assert float(due[1]) == pytest.approx(4.0, abs=0.1) and due[5] == reached[5] == "-" and abs(float(reached[1])) < 4


def test_a_psi_that_is_not_odd_is_said_to_be(tmp_path, monkeypatch):
    """sqrt: its odd part is optimised; the report measures against that (labels) and against its own optimum."""
    monkeypatch.setattr(ipo, "psi", torch.sqrt)
    run = cli("--overwrite", *SHORT, "--labels", "soft", folder=tmp_path)
    assert "only its odd part, (Psi(q) - Psi(1-q))/2, is optimised" in run.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["labels"]["kl_opt"] > 1e-4 and report["labels"]["kl_fit"] == pytest.approx(0, abs=1e-9) and report["after"]["kl_fit"] > 0
    for psi in ("tanh", "yours"):  # of sqrt, too, hard labels see sqrt(1) - sqrt(0) only
        assert "a coin flip stands for p*" in cli("--overwrite", *SHORT, "--psi", psi, folder=tmp_path).stdout
    monkeypatch.setattr(ipo, "psi", torch.square)  # its odd part is affine, so coin flips are not at fault
    assert "a coin flip" not in (said := cli("--overwrite", *SHORT, "--noise", 0.1, folder=tmp_path).stdout)
    assert "pi*: Psi is not odd about 1/2, and only its odd part, (Psi(q) - Psi(1-q))/2, is optimised; labels are flipped (--noise 0)\n" in said
    assert "divided by length" in cli("--overwrite", *SHORT, "--logp", "mean", folder=tmp_path).stdout
    other = cli("--overwrite", *SHORT, "--loss", "savage", "--logp", "mean", folder=tmp_path).stdout
    assert "this loss has an optimum of its own, not computed" in other and "nearest" not in other
    assert "labels =" not in cli("--overwrite", *SHORT, "--psi", "identity", folder=tmp_path).stdout


# -------------------------------------------------------------------------------------------- Hugging Face's weights

SMALL = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64}
FAMILIES = {  # model_type -> its sizes
    "llama": SMALL, "qwen2": SMALL, "mistral": SMALL, "gemma": SMALL | {"head_dim": 8}, "gemma2": SMALL | {"head_dim": 8}, "phi": SMALL,
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, "bloom": {"vocab_size": 257, "hidden_size": 32, "n_layer": 2, "n_head": 4}}
GPT2S = [{}, {"tie_word_embeddings": False}, {"n_layer": 1, "n_embd": 48, "n_head": 3, "n_positions": 20}]


def hugging_face(folder, model_type="gpt2", tokenizer=True, **sizes):
    """A model of transformers with random weights, saved in `folder`, with a tokenizer of bytes beside it."""
    import transformers
    torch.manual_seed(0)
    sizes = sizes or FAMILIES.get(model_type, {})
    if model_type == "gpt2":
        sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0} | sizes
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    if tokenizer:
        D.save_tokenizer(D.get_tokenizer("bytes"), str(folder))
    return model


def assert_same_logits(ours, theirs):
    tokens = torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        assert (ours.eval()(tokens) - expected).abs().max() < 1e-4 and expected.std() > 0.01
        mask = torch.arange(12).expand(3, 12) >= torch.tensor([[3], [5], [1]])
        logp = expected.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        assert torch.allclose(M.sequence_logp(ours, tokens, mask), (logp * mask[:, 1:]).sum(1), atol=1e-3)


@pytest.mark.parametrize("sizes", GPT2S)
def test_gpt2_comes_in_and_goes_out(tmp_path, sizes):
    """GPT-2's weights go into our own GPT, with and without a tied head: same logits; exported, they are the same again."""
    import transformers
    theirs = hugging_face(tmp_path / "in", **sizes)
    ours = M.load_pretrained(str(tmp_path / "in"))
    assert isinstance(ours, M.GPT) and ours.config.tied == sizes.get("tie_word_embeddings", True)
    assert_same_logits(ours, theirs)
    M.export(ours, tmp_path / "out", 0)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back).__name__ == "GPT2LMHeadModel" and (tmp_path / "out/model.safetensors").exists()
    assert_same_logits(ours, back)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_other_families_stand_behind_the_same_two_calls(tmp_path, model_type):
    """Hidden states and head give transformers' own logits; padding on the right changes nothing; a checkpoint and an export
    return the same model; dropout is off in training."""
    import transformers
    theirs = hugging_face(tmp_path / "in", model_type)
    ours = M.load_pretrained(str(tmp_path / "in"))
    assert isinstance(ours, M.Pretrained)
    assert_same_logits(ours, theirs)
    tokens, mask = torch.randint(257, (2, 9)), torch.arange(9).expand(2, 9) >= 4
    longer = torch.cat([tokens, torch.zeros(2, 5, dtype=torch.int64)], 1)
    pads = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], 1)
    assert torch.allclose(M.sequence_logp(ours, tokens, mask), M.sequence_logp(ours.train(), longer, pads), atol=1e-4)
    M.save_checkpoint(tmp_path / "a.pt", ours, tokenizer="x")
    again, extra = M.load_checkpoint(tmp_path / "a.pt")
    assert extra == {"tokenizer": "x"}
    assert_same_logits(again, theirs)
    M.export(again, tmp_path / "out", 0)
    assert_same_logits(again, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_a_gpt2_that_is_not_plain_keeps_its_own_code(tmp_path):
    """Another activation: our GPT has none, so transformers' model does the work."""
    theirs = hugging_face(tmp_path, activation_function="relu")
    ours = M.load_pretrained(str(tmp_path))
    assert isinstance(ours, M.Pretrained)
    assert_same_logits(ours, theirs)


def test_what_cannot_be_loaded_is_refused_in_a_line(tmp_path):
    """Not there, an encoder-decoder, one that sees the future, logits that are scaled elsewhere, missing weights, no model at all."""
    import transformers
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=32)).save_pretrained(tmp_path / "t5")
    transformers.BertForMaskedLM(transformers.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    transformers.GraniteForCausalLM(transformers.GraniteConfig(**small, num_key_value_heads=2, logits_scaling=8.0)).save_pretrained(tmp_path / "granite")
    hugging_face(tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes((tmp_path / "cut/model.safetensors").read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    for name, words in (("nothing", "nothing"), ("t5", "encoder-decoder"), ("bert", "not a head of causal"), ("granite", "not a head of causal"), ("cut", "cut"),
                        ("empty", "empty")):
        with pytest.raises(M.BadCheckpoint) as error:
            M.load_pretrained(str(tmp_path / name))
        assert words in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("--init_from "), str(error.value)


def test_a_tokenizer_goes_out_and_comes_back(tmp_path):
    """Bytes saved for transformers, read back: same ids; what is spelled "<|endoftext|>" is text and no token."""
    ours = D.get_tokenizer("bytes")
    D.save_tokenizer(ours, str(tmp_path))
    theirs = D.HuggingFaceTokenizer(str(tmp_path))
    for text in ("plain", "é 🙂 \x00", " <|endoftext|> "):
        assert theirs.encode_ordinary(text) == ours.encode_ordinary(text) and theirs.decode(ours.encode_ordinary(text)) == text
    assert (theirs.eot_token, theirs.n_vocab, theirs.start) == (ours.eot_token, 257, [])


def test_what_a_model_expects_before_any_text_stands_before_every_prompt():
    """Llama's <s>, say: kept when prompts are cut, not scored, and in its place when the prompt is empty."""
    tok = D.get_tokenizer("bytes")
    starting = Namespace(encode_ordinary=tok.encode_ordinary, eot_token=tok.eot_token, start=[77])
    data = D.encode([D.Pair("0123456789" * 4, "yes", "no"), D.Pair("", "yes", "no")], starting, 16)
    assert data.prompt_ids(0) == [77] + tok.encode("0123456789" * 4)[-11:] and data.prompt_ids(2) == [77]
    assert data.rows(torch.arange(2))[0].shape[1] == 16


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_hugging_face_model_is_trained_and_returned(tmp_path, model_type):
    """Folder and pairs in, folder out: the exported policy is the checkpoint's, and not the reference; both can be sampled from."""
    import transformers
    theirs = hugging_face(tmp_path / "in", model_type)
    path = some_pairs(tmp_path)
    run = cli("--data", path, "--init_from", "in", "--steps", 6, "--batch_size", 4, "--lr", 1e-2, "--log_every", 3, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "exported for AutoModelForCausalLM.from_pretrained: out/export/" in run.stdout and "step 0: loss 25, theory 25" in run.stdout
    policy, reference = (M.load_checkpoint(tmp_path / f"out/{name}.pt")[0] for name in ("ckpt", "ref"))
    assert_same_logits(reference, theirs)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/export")
    assert_same_logits(policy, back)
    tokens = torch.randint(257, (1, 9))
    assert (back(tokens).logits - theirs(tokens).logits).abs().max() > 1e-2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out/export").encode("ab") == D.get_tokenizer("bytes").encode("ab")
    weights = (tmp_path / "in/model.safetensors").read_bytes()
    for folder, message in (("in", "--init_from is the same folder"), ("out/export", "holds a model; replace it (--overwrite)")):
        wrong = cli("--data", path, "--init_from", "in", "--export", folder, "--out", "new", folder=tmp_path)
        assert wrong.returncode == 2 and wrong.stderr.startswith(f"ipo.py: --export {folder}: {message}")
    assert (tmp_path / "in/model.safetensors").read_bytes() == weights
    (tmp_path / "file").write_text("in the way")
    wrong = cli("--data", path, "--init_from", "in", "--export", "file", "--out", "new", folder=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr == "ipo.py: file: File exists; name a folder that can be written (--out, --export)\n"
    said = [cli("--sample", "question 1?", "--max_new_tokens", 5, *more, folder=tmp_path) for more in ([], ["--init_from", "out/export"])]
    assert said[0].returncode == said[1].returncode == 0 and said[0].stdout == said[1].stdout


def test_a_gpt_from_scratch_is_exported(tmp_path, monkeypatch):
    """As GPT-2, with its tokenizer. (Here the tokenizer "gpt2" is one of bytes: the real one is a download.)"""
    import transformers
    monkeypatch.setattr(D, "get_tokenizer", lambda name, *_: D.word_encoding("gpt2", [], []))
    run = cli("--data", some_pairs(tmp_path), *JSONL_RUN[2:], "--export", "hf", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_same_logits(M.load_checkpoint(tmp_path / "out/ckpt.pt")[0], transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")) == 257


@pytest.mark.parametrize("model_type, sizes", [("llama", {"attention_dropout": 0.5}), ("gpt_neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5})])
def test_dropout_of_other_families_is_off_in_training(tmp_path, model_type, sizes):
    """Two passes in training mode agree: else pi would not be ref at step 0."""
    hugging_face(tmp_path, model_type, **FAMILIES[model_type] | sizes)
    model = M.load_pretrained(str(tmp_path)).train()
    tokens = torch.randint(257, (2, 9))
    assert torch.equal(model(tokens), model(tokens))


def test_missing_weights_are_not_made_up(tmp_path):
    """transformers would fill them with random numbers and a warning."""
    from safetensors.torch import load_file, save_file
    hugging_face(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "model.norm.weight"}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(M.BadCheckpoint, match="weights are missing or of another shape: .*model.norm.weight"):
        M.load_pretrained(str(tmp_path))


def test_tokenizer_and_model_must_match(tmp_path):
    """A tokenizer with more ids than the model reads is refused; a model without tokenizer files has GPT-2's only if it has its ids."""
    hugging_face(tmp_path / "small", vocab_size=200)
    run = cli("--data", some_pairs(tmp_path), "--init_from", "small", folder=tmp_path)
    assert run.returncode == 2 and "its tokenizer has 257 ids, its model reads only 200" in run.stderr
    hugging_face(tmp_path / "bare", tokenizer=False)
    run = cli("--data", "pairs.jsonl", "--init_from", "bare", folder=tmp_path)
    assert run.returncode == 2 and "bare: its tokenizer cannot be loaded" in run.stderr and run.stderr.count("\n") == 1


def test_gpt2s_ids_have_gpt2s_tokenizer(tmp_path, monkeypatch, capsys):
    """Only where there is none: another tokenizer with as many ids, damaged or without end of text, is never replaced in silence."""
    monkeypatch.setattr(D.tiktoken, "get_encoding", lambda name: name)
    hugging_face(tmp_path, tokenizer=False)
    assert D.get_tokenizer(str(tmp_path), 50257) == "gpt2" and "GPT-2's tokenizer is used" in capsys.readouterr().out
    D.save_tokenizer(D.get_tokenizer("bytes"), str(tmp_path))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(D.Refused, match="no end-of-text token to train"):
        D.get_tokenizer(str(tmp_path), 50257)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(D.Refused, match="its tokenizer cannot be loaded"):
        D.get_tokenizer(str(tmp_path), 50257)


def test_samples_begin_with_what_the_model_expects(tmp_path, monkeypatch):
    """<s> and the like stand before a sampled prompt, too; --grad_checkpoint reaches the model of a run."""
    hugging_face(tmp_path / "in")
    tokenizer, seen = D.HuggingFaceTokenizer(str(tmp_path / "in")), []
    tokenizer.start = [77]
    monkeypatch.setattr(D, "get_tokenizer", lambda *_: tokenizer)
    generate = M.generate
    monkeypatch.setattr(M, "generate", lambda model, prompt, *more: seen.append(prompt) or generate(model, prompt, *more))
    assert cli("--sample", "ab", "--init_from", "in", "--max_new_tokens", 2, folder=tmp_path).returncode == 0
    assert seen == [[77, *tokenizer.encode_ordinary("ab")]]
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **kw: calls.append(1) or checkpoint(*args, **kw))
    for more in ([], ["--grad_checkpoint"]):
        run = cli("--data", some_pairs(tmp_path), "--init_from", "in", "--steps", 2, "--batch_size", 4, *more, "--overwrite", folder=tmp_path)
        assert run.returncode == 0 and len(calls) == (4 if more else 0), run.stderr


# ---------------------------------------------------------------------------------------------------------- less memory


@pytest.mark.parametrize("loss", ["ipo", "dpo"])
def test_a_batch_in_parts_is_the_batch(tmp_path, loss):
    """--accum 3 on batches of 32, parts of 11, 11 and 10: same weights and same log line as in one piece, to float tolerance; in SFT, too."""
    logs, weights = [], []
    for accum in (1, 3):
        run = cli(*SHORT, "--loss", loss, "--accum", accum, "--out", accum, folder=tmp_path)
        assert run.returncode == 0, run.stderr
        logs.append([json.loads(line) for line in (tmp_path / f"{accum}/metrics.jsonl").read_text().splitlines()])
        weights.append([M.load_checkpoint(tmp_path / f"{accum}/{name}.pt")[0].state_dict() for name in ("ref", "ckpt")])
    for whole, parts in zip(*weights):
        assert all(torch.allclose(whole[k], parts[k], atol=1e-4) for k in whole)
    for whole, parts in zip(*logs):
        assert all(whole[k] == pytest.approx(parts[k], abs=2e-3) for k in ("loss", "h", "h_std", "chosen", "rejected", "win"))


@pytest.mark.parametrize("model_type", ["ours", "llama"])
def test_recomputed_activations_give_the_same_gradient(tmp_path, model_type, monkeypatch):
    """Gradient checkpointing changes memory and time only; the blocks run once more in the backward pass."""
    if model_type == "ours":
        model, V = tiny(), 5
    else:
        hugging_face(tmp_path, model_type)
        model, V = M.load_pretrained(str(tmp_path)), 257
    tokens, grads, calls = torch.randint(V, (2, 6)), [], []
    inside = model.transformer.h[0].attn if model_type == "ours" else model.model.base_model.layers[0].self_attn
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        M.place(model, "cpu", recompute).train()
        model.zero_grad()
        M.sequence_logp(model, tokens, torch.arange(6).expand(2, 6) > 2).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads)) and len(grads[0]) == len(grads[1]) > 0 and len(calls) == 3


def test_top_p_keeps_the_fewest_tokens_with_that_share():
    """Tokens seen in 400 draws are exactly those; the likeliest one always stays."""
    model, prompt = tiny(), [1, 2]
    probs, order = model(torch.tensor([prompt]))[0, -1].softmax(-1).sort(descending=True)
    for top_p in (1e-9, probs[0].item() + 0.01, 1 - probs[-1].item() - 1e-4, 1.0):
        n = 1 + int((probs.cumsum(0) < top_p).sum()) if top_p < 1 else 5
        g = torch.Generator().manual_seed(0)
        seen = {M.generate(model, prompt, 1, top_p=top_p, generator=g)[0] for _ in range(400)}
        assert seen == set(order[:n].tolist())


def test_prompts_come_from_standard_input(tmp_path, monkeypatch):
    assert cli(*SHORT, folder=tmp_path).returncode == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("review of the pizza:\nreview of the beer:\n"))
    run = cli("--sample", "-", folder=tmp_path)
    alone = [cli("--sample", f"review of the {s}:", folder=tmp_path).stdout for s in ("pizza", "beer")]
    assert run.returncode == 0 and run.stdout == "".join(alone)


# -------------------------------------------------------------------------------------------------- README and layout

README = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""


def original(name):
    """Lines of a source file, with the paper's psi between the banners, whatever a student wrote there."""
    text = (HERE / name).read_text(encoding="utf-8")
    psi = re.search(r"```python\n(def psi.*?\n    return q\n)", README, re.S)[1]
    return re.sub(r"(# =+ EXERCISE: .*?=+\n).*?(# =+ END OF THE EXERCISE =+\n)", lambda m: f"{m[1]}\n\n{psi}\n\n{m[2]}", text, flags=re.S).splitlines()


def test_the_readme_quotes_the_code():
    """Every line of the README's Python blocks stands in the source, letter for letter; the losses stand there verbatim and first."""
    source = {line.rstrip() for name in ("ipo.py", "model.py", "data.py") for line in original(name)}
    quoted = [line for block in re.findall(r"```python\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()]
    assert quoted and not [line for line in quoted if line.rstrip() not in source]
    assert "def dpo_loss" in "\n".join(README.splitlines()[:50]) and "| 4 | [test_ipo.py]" in "\n".join(README.splitlines()[:50])


def test_the_readme_counts_and_cites_lines():
    """Lines of each file; in tables, a quoted line of code and where it stands. (The answers to the exercises are one line each.)"""
    for name, lines in re.findall(r"^\| \d \| \[(\w+\.py)\]\(\1\) \| ([\d,]+) \|", README, re.M):
        assert int(lines.replace(",", "")) == len(original(name)), f"{name} has {len(original(name))} lines"
    begin = next(n for n, line in enumerate(original("ipo.py"), 1) if "--- measurement" in line) - 1
    assert f"training loop: the first {begin} lines" in README, begin
    three = sum(len(original(name)) for name in ("ipo.py", "model.py", "data.py"))
    assert f"| nanoIPO | this | 11.560 | the paper's sum | {three:,} |" in README, three
    cited = re.findall(r"\| `([^`|]+)` \|[^|\n]*\| \[(\w+\.py):(\d+)\]\(\2#L\3\) \|", README)
    assert len(cited) >= 12
    for code, name, line in cited:
        where = [n for n, text in enumerate(original(name), 1) if text.strip().startswith(code)]
        assert int(line) in where, f"{code!r} stands in {name} at {where}, not {line}"


def test_links_and_pictures_and_names_of_the_readme():
    """Links lead to files, lines and headings that exist; tests that are named exist; each picture has the command that draws it."""
    slug = lambda title: re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
    anchors = {slug(title) for title in re.findall(r"^#+ (.*)$", README, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        path, _, anchor = target.partition("#")
        if not path.startswith("https://"):
            assert (HERE / path).exists() and (path or anchor in anchors), target
    missing = {name for name in re.findall(r"\btest_\w+", README) if name != "test_ipo" and name not in globals()}
    assert not missing, missing
    commands = {line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()}
    for line, image in re.findall(r"(.*)\n!\[.*?\]\((.*?)\)", README):
        command = re.fullmatch(r"<!-- measured: python ipo.py (.*) -->", line)
        assert command and ipo.parse(shlex.split(command[1])).plot, image
    for inline in re.findall(r"`python ipo.py( [^`]*)`", README):  # those of the shell blocks are run
        if not inline.endswith(("--data", "--help")) and "--loss mine" not in inline:
            ipo.parse(shlex.split(inline))
    for command in re.findall(r"<!-- measured: (.*?) -->", README):
        assert re.fullmatch(r"python test_ipo.py \w+", command) or "--plot" in command or command in " ".join(commands), command


def test_the_first_command_prints_what_the_readme_says(default_run):
    """The default run in full: every number of the README's six lines, within 3 % or .002 (.05 for a single batch)."""
    _, run = default_run
    lines = re.search(r"<!-- measured: python ipo.py --loss ipo -->\n```\n(.*?)```", README, re.S)[1].splitlines()
    numbers = lambda text: [float(x) for x in re.findall(r"[-+]?\d+\.?\d*", text.replace("target^2", "").split(" | ...")[0])]
    assert len(lines) == 6
    words = lambda text: re.sub(r"[\s\d.+-]", "", text.split(" | ...")[0])
    for line in lines:
        there = [printed for printed in run.stdout.splitlines() if words(printed).startswith(words(line))][-1]
        for said, got in zip(numbers(line), numbers(there)):
            assert got == pytest.approx(said, rel=0.03, abs=0.05 if line.startswith("step  ") else 2e-3), (line, there)


def test_the_readme_explains_every_flag_and_no_other():
    flags = {row[0] for row in ipo.FLAGS}
    assert flags == set(re.findall(r"--([a-z_]+)", README)) & flags
    assert set(re.findall(r"--([a-z_]+)", README)) <= flags | {"help", "nproc_per_node"} and "@" not in README


BANDIT = "--steps 20 --seeds 2 --log_every 10".split()


def test_readme_commands_run(tmp_path):
    """Every command of the README's shell blocks, its steps cut down and its tokens of bytes, on a file of pairs of our own."""
    some_pairs(tmp_path)
    hugging_face(tmp_path / "hf")  # in the hub's place
    commands = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    runs = [shlex.split(part, comments=True) for line in commands for part in line.split("&&") if "python ipo.py" in part]
    assert len(runs) >= 5
    for words in runs:
        words = ["pairs.jsonl" if w.endswith(".jsonl") else "hf" if w == "gpt2" else w for w in words[2:]]
        bandit = any(w in D.BANDITS for w in words)
        cut = [] if "--sample" in words else JSONL_RUN if "pairs.jsonl" in words else BANDIT if bandit else SHORT
        if "--init_from" in words and "--sample" not in words:
            cut = ["--steps", "6", "--batch_size", "4"]
        run = cli(*words, *cut, folder=tmp_path)
        assert run.returncode == 0, (words, run.stderr)
    assert any("pytest" in line for line in commands)


def test_the_house_has_six_rooms():
    """The six files and nothing else at the top, and leaves that import nothing of ours."""
    tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout.split()
    tops = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    files = {"README.md", "ipo.py", "model.py", "data.py", "test_ipo.py", "requirements.txt"}
    assert tops in (files, set()) and all((HERE / name).exists() for name in files)  # set(): no git here
    for leaf in ("model.py", "data.py"):
        assert not re.search(r"^\s*(import|from) (ipo|model|data)\b", (HERE / leaf).read_text(), re.M)


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
USER, TALK = {"role": "user", "content": "Hi"}, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


def chat_folder(folder, template=CHATML, eos="<|im_end|>"):
    """A random GPT-2 of bytes whose tokenizer has ChatML's control tokens and a chat template."""
    from transformers import AutoTokenizer
    hugging_face(folder, vocab_size=259)
    hf = AutoTokenizer.from_pretrained(folder)
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": eos})
    hf.chat_template = template
    hf.save_pretrained(folder)
    return folder


CHAT_PAIRS = [  # the same pair, written in five ways
    {"prompt": [USER], "chosen": [TALK[1]], "rejected": [{"role": "assistant", "content": "No"}]},
    {"chosen": TALK, "rejected": [USER, {"role": "assistant", "content": "No"}]},
    {"prompt": [USER], "chosen": TALK, "rejected": [USER, {"role": "assistant", "content": "No"}]},
    {"prompt": "Hi", "chosen": TALK, "rejected": [USER, {"role": "assistant", "content": "No"}]},
    {"prompt": [], "chosen": [USER | {"name": "Ann"}, TALK[1]], "rejected": [USER, {"role": "assistant", "content": "No"}]}]


@pytest.mark.parametrize("pair", CHAT_PAIRS)
def test_conversations_go_through_the_chat_template(tmp_path, pair, capsys):
    """The prompt ends where the assistant's turn begins; the response is trained up to its end-of-turn token, once; the line
    break that the template puts behind that is not trained."""
    tokenizer = D.get_tokenizer(str(chat_folder(tmp_path / "m")))
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    data = D.encode(D.read_jsonl(str(tmp_path / "pairs.jsonl")), tokenizer, 64)
    end = data.start[1:] - 1
    assert tokenizer.decode(data.prompt_ids(0)) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(data.tokens[data.start[r] + data.prompt_len[r]:data.start[r + 1]].tolist()) for r in (0, 1)] == [
        "Yes.<|im_end|>", "No<|im_end|>"]
    assert data.tokens[end].tolist() == [tokenizer.eot_token] * 2
    assert "<|im_start|>" not in map(chr, range(128)) and (data.tokens == tokenizer.hf.convert_tokens_to_ids("<|im_start|>")).sum() == 4
    assert ("'chosen[].name' (1 lines)" in capsys.readouterr().out) == ("name" in pair["chosen"][0])


def test_a_template_without_end_of_text_gets_one(tmp_path):
    """Where the model's end of text is another token than the template's end of turn, both are trained."""
    tokenizer = D.get_tokenizer(str(chat_folder(tmp_path / "m", eos="<|endoftext|>")))
    _, prompt, chosen, _ = D.pair_ids(D.Pair([USER], "Yes.", "No"), tokenizer)
    data = D.encode([D.Pair([USER], "Yes.", "No")], tokenizer, 64)
    assert tokenizer.decode(data.tokens[len(prompt):data.start[1]].tolist()) == "Yes.<|im_end|>\n<|endoftext|>"


@pytest.mark.parametrize("template, pair, message", [
    (None, CHAT_PAIRS[0], "pairs.jsonl:1: the model's tokenizer has no chat template"),
    (CHATML, {"prompt": [USER], "chosen": [{"role": "assistant", "content": "a<|im_end|>"}], "rejected": [TALK[1]]},
     "pairs.jsonl:1: a message holds '<|im_end|>', which the chat template would make a control token; remove it"),
    ("{{ raise_exception('no system here') }}", CHAT_PAIRS[0], "pairs.jsonl:1: the model's chat template refuses these messages (no system here); mend their roles or order"),
    ("{{ messages|length }}" + CHATML, CHAT_PAIRS[0], "pairs.jsonl:1: the model's chat template does not write the prompt alike with and without an answer"),
    (CHATML, {"chosen": TALK, "rejected": "No"}, "pairs.jsonl:1: one of chosen and rejected is a list of messages"),
    (CHATML, {"prompt": [USER], "chosen": "Yes", "rejected": "No"}, "pairs.jsonl:1: one of chosen and rejected is a list of messages, or prompt is, and another is a text; write all of them alike"),
    (CHATML, {"chosen": TALK, "rejected": [USER | {"content": "Ho"}, TALK[1]]}, "pairs.jsonl:1: chosen and rejected differ before their last messages"),
    (CHATML, {"chosen": TALK, "rejected": [USER]}, "pairs.jsonl:1: chosen and rejected must end in a message of role 'assistant'"),
    (CHATML, {"prompt": "Ho", "chosen": TALK, "rejected": [USER, USER | {"role": "assistant"}]}, "pairs.jsonl:1: 'prompt' is a text that no message of both conversations has; leave it out"),
    (CHATML, {"chosen": TALK, "rejected": ["No"]}, "pairs.jsonl:1: 'rejected' holds 'No', which is no message; write "),
    (CHATML, {"chosen": TALK, "rejected": [USER | {"content": ["No"]}]}, "pairs.jsonl:1: 'rejected' holds "),
    (CHATML, {"chosen": TALK, "rejected": [USER, {"role": "assistant", "content": ""}]}, "pairs.jsonl:1: 'rejected' is empty"),
    (CHATML, {"chosen": TALK, "rejected": []}, "pairs.jsonl:1: chosen and rejected must end in a message of role 'assistant'"),
])
def test_conversations_that_cannot_be_used_are_named(tmp_path, template, pair, message):
    chat_folder(tmp_path / "m", template)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    run = cli("--data", "pairs.jsonl", "--init_from", "m", "--holdout", 0, folder=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith(f"ipo.py: {message}") and run.stderr.count("\n") == 1, run.stderr


def test_messages_need_a_model_with_a_template(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(CHAT_PAIRS[0]))
    run = cli("--data", "pairs.jsonl", "--tokenizer", "bytes", folder=tmp_path)
    assert run.returncode == 2 and "pairs.jsonl:1: it holds messages, which need the chat template of a" in run.stderr
    run = cli("--data", "bt", *SHORT, folder=tmp_path)
    assert "--chat needs the chat template" in cli("--sample", "Hi", "--chat", folder=tmp_path).stderr


def test_a_chat_model_is_trained_and_asked_in_its_template(tmp_path):
    """One command each way, on messages; --chat puts the text where a user's message stands."""
    chat_folder(tmp_path / "m")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(CHAT_PAIRS[0] | {"prompt": [USER | {"content": c}]}) + "\n" for c in "abcdef"))
    run = cli("--data", "pairs.jsonl", "--init_from", "m", "--steps", 30, "--lr", 3e-3, "--batch_size", 4, "--show", 1, folder=tmp_path)
    assert run.returncode == 0 and "chosen" in run.stdout and "Yes" not in run.stderr, run.stderr
    args = Namespace(max_new_tokens=5, temperature=1.0, top_k=0, top_p=1.0, seed=0)
    for name in "out/export", "m":
        model, tokenizer = M.load_model(str(tmp_path / name))[0], D.get_tokenizer(str(tmp_path / name))
        run = cli("--sample", "Hi", "--chat", "--init_from", name, "--max_new_tokens", 5, folder=tmp_path)
        assert run.returncode == 0 and run.stdout == "Hi" + M.continuation(model, tokenizer.chat([USER], [])[0], tokenizer, args) + "\n"
    plain = cli("--sample", "Hi", "--init_from", "m", "--max_new_tokens", 5, folder=tmp_path)
    assert plain.stdout != run.stdout


def test_no_space_appears_before_a_response(tmp_path):
    """SentencePiece's tokenizers put a space before any text; between prompt and response nobody wrote one. The tokens of one
    pair: chosen begins with "Bl", not with "_Bl", unless it begins the text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = ["</s>", "\u2581", "\n", *"Blue?rdCo", "Bl", "\u2581Bl", "ue"]
    hf = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(letters)}, [("B", "l"), ("\u2581", "Bl"), ("u", "e")]))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    hf.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always", split=False)
    PreTrainedTokenizerFast(tokenizer_object=hf, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = D.get_tokenizer(str(tmp_path))
    show = lambda ids: tokenizer.hf.convert_ids_to_tokens(ids)
    assert show(tokenizer.encode_ordinary("Blue")) == ["\u2581Bl", "ue"]
    _, prompt, chosen, rejected = D.pair_ids(D.Pair("Color?\n", "Blue", "red Blue"), tokenizer)
    assert show(prompt)[0] == "\u2581" and show(chosen) == ["Bl", "ue"] and show(rejected) == ["r", "e", "d", "\u2581Bl", "ue"]
    assert show(D.pair_ids(D.Pair("", "Blue", "red"), tokenizer)[2]) == ["\u2581Bl", "ue"]
    tokenizer.hf.chat_template = "{{ messages[0].content }}\n{% if messages|length > 1 %}{{ messages[1].content }}{% endif %}"
    assert show(D.pair_ids(D.Pair([USER | {"content": "Color?"}], "Blue", "red"), tokenizer)[2]) == ["Bl", "ue"]
    model = M.GPT(M.GPTConfig(16, len(letters), 1, 1, 8))
    args = Namespace(max_new_tokens=2, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    with torch.no_grad():  # a model that always says "_Bl": its space must be printed
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[letters.index("\u2581Bl")] * 1e4)
    assert M.continuation(model, prompt, tokenizer, args) == " Bl Bl"


def test_gpt2_tokens_from_vocabulary_and_merges(tmp_path):
    """A folder as old as GPT-2 has only vocab.json and merges.txt: same ids as tiktoken's algorithm on the same merges."""
    import tiktoken
    from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer  # noqa: F401  its files' names
    hugging_face(tmp_path, vocab_size=260, tokenizer=False)
    table = {}  # GPT-2 writes a byte as a letter: printable ones as they are, others from U+0100 on
    for b in range(256):
        table[b] = chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255 else chr(256 + sum(v >= "\u0100" for v in table.values()))
    merges = [("h", "e"), ("he", "y"), (table[32], "hey")]
    vocab = {c: b for b, c in table.items()} | {a + b: 256 + i for i, (a, b) in enumerate(merges)} | {"<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
    ours = D.get_tokenizer(str(tmp_path), 260)
    ranks = {bytes([b]): b for b in range(256)} | {b"he": 256, b"hey": 257, b" hey": 258}
    oracle = tiktoken.Encoding("g", pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""", mergeable_ranks=ranks,
                               special_tokens={"<|endoftext|>": 259})
    for text in "hey hey", "they  hey\n hey!", "caf\u00e9 \U0001f600 <|endoftext|>":
        assert ours.encode_ordinary(text) == oracle.encode_ordinary(text) and ours.decode(ours.encode_ordinary(text)) == text
    assert ours.eot_token == 259


@pytest.mark.parametrize("dropped", ["nothing", "a row twice", "one row"])
def test_shared_prefixes_change_nothing(dropped):
    """Distinct prefixes computed once give the log-probs and gradients of the plain pass over every position, padding included;
    how many there are is counted by brute force."""
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(16, 11, 2, 2, 16)).double()
    tokens, length, prompt = torch.randint(3, (6, 9)), torch.tensor([9, 7, 8, 9, 4, 8]), torch.tensor([3, 3, 2, 3, 3, 1])
    tokens[3:, :3] = tokens[:3, :3]
    if dropped != "nothing":
        tokens, length, prompt = (z[[0] if dropped == "one row" else [0, 0, 3, 4]] for z in (tokens, length, prompt))
    t = torch.arange(9)
    mask = (t < length[:, None]) & (t >= prompt[:, None])
    ours = M.sequence_logp(model, tokens, mask)
    (ours * torch.arange(1.0, 1 + len(tokens))).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logp = model(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    plain = (logp * mask[:, 1:]).sum(1)
    (plain * torch.arange(1.0, 1 + len(tokens))).sum().backward()
    assert torch.allclose(ours, plain, atol=1e-12)
    assert all(torch.allclose(g, p.grad, atol=1e-12) for g, p in zip(gradients, model.parameters()))
    real = t < length[:, None]
    shared = M.Shared(tokens, real)
    assert len(shared.first) == len({tuple(row[:k + 1].tolist()) for row, n in zip(tokens, length) for k in range(n)})


def test_logits_in_chunks_change_nothing(monkeypatch):
    """More scored positions than CHUNK: same log-probs and gradients, and no tensor of (S,V) is kept for the backward pass."""
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(16, 301, 1, 2, 16)).double()
    tokens, mask = torch.randint(301, (4, 12)), torch.arange(12).expand(4, 12) >= 2
    results = []
    for chunk in 512, 7:
        monkeypatch.setattr(M, "CHUNK", chunk)
        model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.numel()) or z, lambda z: z):
            logp = M.sequence_logp(model, tokens, mask)
        logp.square().sum().backward()
        results.append([logp.detach(), *(p.grad.clone() for p in model.parameters())])
        assert (max(kept) >= 40 * 301) == (chunk == 512)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results))


@pytest.mark.parametrize("dtype, recompute", [("float32", False), ("bfloat16", False), ("float32", True)])
def test_estimated_activations_are_those_that_are_kept(dtype, recompute):
    """Bytes that autograd keeps for the backward pass, each storage counted once, weights and logits left out: within a fifth of
    the estimate, whatever shares prompts, pads or recomputes."""
    torch.manual_seed(0)
    model = M.place(M.GPT(M.GPTConfig(64, 11, 6, 2, 48)), "cpu", recompute).train()
    rows = [([i // 2] * 20, [i + 2] * n) for i, n in enumerate((20, 31, 9, 40))]
    pairs = D.PairData(*D.pack(rows), torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2), torch.arange(2), torch.arange(2))
    pairs = pairs._replace(tokens=pairs.tokens.clone())
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(z):
        if z.is_floating_point() and z.untyped_storage().data_ptr() not in weights:
            kept[z.untyped_storage().data_ptr()] = z, z.untyped_storage().nbytes()
        return z
    batch = pairs.batch(torch.arange(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z), M.autocast(model, dtype):
        logp = M.sequence_logp(model, batch.tokens, batch.mask)
    estimate, measured = M.memory(model, pairs, 2, dtype), sum(size for _, size in kept.values())
    size = 16 * sum(p.numel() for p in model.parameters())
    copies = estimate["weights, gradients, Adam"] - size  # of the weights in bfloat16, kept, too
    if recompute:  # plus one block's, which its backward pass makes again
        assert estimate["activations"] < M.memory(M.place(model, "cpu"), pairs, 2, dtype)["activations"] / 2
    else:
        assert 0.8 < measured / (estimate["activations"] + copies) < 1.2, (measured, estimate)
    assert copies == (size // 8 if dtype == "bfloat16" else 0) and logp.requires_grad


def test_show_prints_the_tokens_of_a_pair(tmp_path):
    """Before training each token's log ref, afterwards its log-ratio: they sum to the log-prob that the loss saw, end-of-text
    is there, and what both responses share at the start moves alike."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Q?\\n", "chosen": "abc", "rejected": "abd\\t"}\n' * 3)
    run = cli("--data", "pairs.jsonl", "--tokenizer", "bytes", "--holdout", 0, "--sft_steps", 5, "--steps", 10, "--show", 1, "--batch_size", 2, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    first, last = [part.split("\n\n")[0] for part in run.stdout.split("first 1 pairs, ")[1:]]
    assert first.startswith("log ref of each token in nats\n'Q?\\n'  p 1.00\n") and last.startswith("log pi/ref of each token")
    for part in first, last:
        rows = [line.split("= ") for line in part.splitlines()[2:4]]
        assert [re.sub(r"\[[^\]]*\]", "", row[1]) for row in rows] == ["a b c <|endoftext|>", "a b d \\t <|endoftext|>"]
        values = [[float(v) for v in re.findall(r"\[([-+.\d]+)\]", row[1])] for row in rows]
        assert [float(row[0].split()[1]) for row in rows] == pytest.approx([sum(v) for v in values], abs=0.04)
        assert values[0][:2] == values[1][:2] and values[0] != values[1][:4]
    report = json.loads((tmp_path / "out/report.json").read_text())["after"]
    assert [sum(v) for v in values] == pytest.approx([report["chosen"], report["rejected"]], abs=0.04)
    model, _ = M.load_checkpoint(str(tmp_path / "out/ref.pt"))
    tokens = torch.tensor([list(b"Q?\nabc")]) + 1
    tokens = torch.tensor([D.get_tokenizer("bytes").encode_ordinary("Q?\nabc") + [D.get_tokenizer("bytes").eot_token]])
    assert float(first.splitlines()[2].split()[1]) == pytest.approx(M.sequence_logp(model, tokens, torch.arange(7)[None] >= 3).item(), abs=0.01)


def test_memory_is_foretold_and_measured(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}\n' * 3)
    run = cli("--data", "pairs.jsonl", "--tokenizer", "bytes", "--steps", 2, "--sft_steps", 1, "--n_embd", 256, "--n_layer", 8, folder=tmp_path)
    about = re.search(r"memory: about ([\d.]+) GiB for the longest batch \(weights, gradients, Adam ([\d.]+), activations", run.stdout)
    peak = re.search(r"memory: at most ([\d.]+) GiB so far, the whole process", run.stdout)
    assert 0 < float(about[2]) <= float(about[1]) < float(peak[1]) < 64


def test_a_model_that_looks_ahead_is_refused(tmp_path, monkeypatch):
    """A language model whose tokens see later ones has no log-probs of responses."""
    hugging_face(tmp_path, "llama")
    monkeypatch.setattr(M.Pretrained, "hidden", lambda self, tokens, real=None: self.model.base_model(tokens).last_hidden_state + tokens.flip(1)[..., None])
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda self, tokens: Namespace(logits=self.lm_head(self.model(tokens).last_hidden_state + tokens.flip(1)[..., None])))
    with pytest.raises(M.BadCheckpoint, match="not a head of causal hidden states"):
        M.load_pretrained(str(tmp_path))


def test_bytes_export_as_gpt2_with_its_own_end_of_text(tmp_path):
    import transformers
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}\n' * 3)
    run = cli("--data", "pairs.jsonl", "--tokenizer", "bytes", "--steps", 2, "--sft_steps", 1, "--export", "hf", folder=tmp_path)
    assert run.returncode == 0
    config, hf = transformers.AutoConfig.from_pretrained(tmp_path / "hf"), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == hf.eos_token_id == D.get_tokenizer("bytes").eot_token and hf.decode(hf.encode("h\u00e9")) == "h\u00e9"


# -------------------------------------------------------------------------------------------------- a run to be trusted

WORLD_RUN = "--steps 24 --pairs 2000 --sft_steps 5 --batch_size 32 --log_every 6 --save_every 5 --dropout 0.1".split()
FILE_RUN = ("--data pairs.jsonl --tokenizer bytes --steps 12 --sft_steps 3 --batch_size 4 --log_every 4 --save_every 5 --n_layer 1 --n_embd 16"
            " --n_head 2 --block_size 64 --accum 2 --dropout 0.1").split()


def outcome(folder):
    """What a run left, without its times: weights, optimiser, log, report, metrics."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((folder / "report.json").read_text())
    report.pop("seconds"), [line.pop("seconds") for line in lines]
    optimizer = [value for slot in state["optimizer"]["state"].values() for value in slot.values()]
    return M.digest(state["model"].values(), optimizer), lines, report, state["step"]


def killed_in(function, at):
    """Stands in for ipo.M.save_checkpoint: the at-th save is the last thing that happens, half done."""
    calls = []

    def save(path, *args, **more):
        calls.append(path)
        if len(calls) == at:
            pathlib.Path(f"{path}.tmp").write_bytes(b"half")
            raise SystemExit(9)
        return function(path, *args, **more)
    return save


@pytest.mark.parametrize("flags", [WORLD_RUN, FILE_RUN, ["--loss", "ipo", "simpo", *WORLD_RUN]], ids=["world", "file", "grid"])
def test_a_resumed_run_is_the_same_run(tmp_path, flags):
    """Killed during its 1st to 5th save, at the reference, in the middle, in a later run of a grid: resumed, it ends with the same
    weights, optimiser, metrics, report and samples, bit for bit, as the run that nothing interrupted."""
    some_pairs(tmp_path)
    whole = cli(*flags, "--out", "whole", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    folders = sorted(p.parent.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").glob("**/ckpt.pt"))
    samples = lambda run: run.stdout[run.stdout.rindex("step    "):run.stdout.index("\nseconds:")].split("\n\n", 1)[1]
    for at in (1, 2, 4) if len(folders) == 1 else (3, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ipo.M, "save_checkpoint", killed_in(M.save_checkpoint, at))
            assert cli(*flags, "--out", f"o{at}", folder=tmp_path).returncode == 9
        resumed = cli("--resume", "--out", f"o{at}", folder=tmp_path)
        assert resumed.returncode == 0, resumed.stderr
        assert ("resumed after step" in resumed.stdout) == (at > 2)
        assert samples(resumed) == samples(whole)
        for name in folders:
            a, b = (torch.load(tmp_path / out / name / "ckpt.pt", weights_only=True) for out in ("whole", f"o{at}"))
            assert M.digest(a["model"].values()) == M.digest(b["model"].values()) and a["step"] == b["step"]
        if len(folders) == 1:
            assert outcome(tmp_path / "whole") == outcome(tmp_path / f"o{at}")


def test_kill_9_loses_nothing(tmp_path):
    """Processes that are killed at two moments of training: what is on the disk is whole, and the resumed run is the same run."""
    flags = [*WORLD_RUN, "--steps", "400", "--save_every", "1", "--log_every", "100"]
    assert cli(*flags, "--out", "whole", folder=tmp_path).returncode == 0
    for i, step in enumerate((20, 150)):
        code = "import sys, ipo; ipo.psi = lambda q: q; sys.exit(ipo.main())"
        process = subprocess.Popen([sys.executable, "-c", code, *flags, "--out", f"o{i}"], cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   env=os.environ | {"PYTHONPATH": str(HERE)})
        saved = tmp_path / f"o{i}/ckpt.pt"
        while process.poll() is None and not (saved.exists() and torch.load(saved, weights_only=True)["step"] >= step):
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9
        assert cli("--resume", "--out", f"o{i}", folder=tmp_path).returncode == 0
        assert outcome(tmp_path / "whole") == outcome(tmp_path / f"o{i}")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch, number, status):
    """Ctrl-C and SIGTERM: the step is done and saved, one line says how to go on, the handlers of before are back."""
    assert cli(*WORLD_RUN, "--out", "whole", folder=tmp_path).returncode == 0
    before, calls, batch = signal.getsignal(number), [], D.PairData.batch

    def third(pairs, index):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), number)
        return batch(pairs, index)
    with monkeypatch.context() as patch:
        patch.setattr(D.PairData, "batch", third)
        run = cli(*WORLD_RUN, folder=tmp_path)
    assert run.returncode == status and signal.getsignal(number) == before
    assert run.stderr == "ipo.py: stopped after step 8 of 24; go on with: python ipo.py --resume --out out\n"
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 8
    assert cli("--resume", folder=tmp_path).returncode == 0 and outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(ipo, "fit_reference", lambda *_: os.kill(os.getpid(), number))
        early = cli(*WORLD_RUN, "--out", "early", folder=tmp_path)
        again = cli("--overwrite", *WORLD_RUN, "--out", "whole", folder=tmp_path)
    assert early.returncode == status and early.stderr == "ipo.py: stopped outside training; nothing is saved yet\n"
    assert again.returncode == status and "go on with: " not in again.stderr
    assert cli(*WORLD_RUN, "--out", "early", folder=tmp_path).returncode == 0  # a folder with flags alone is free


def test_a_signal_in_the_last_step_ends_a_grid(tmp_path, monkeypatch):
    """It is not lost between two runs: the second starts with --resume only, and ends as if nothing had happened."""
    grid, batch, calls = ["--loss", "ipo", "dpo", *WORLD_RUN], D.PairData.batch, []
    assert cli(*grid, "--out", "whole", folder=tmp_path).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(D.PairData, "batch", lambda pairs, index: (calls.append(1), len(calls) == 24 and os.kill(os.getpid(), signal.SIGINT), batch(pairs, index))[2])
        run = cli(*grid, folder=tmp_path)
    assert run.returncode == 130 and "stopped after step 24 of 24" in run.stderr and not (tmp_path / "out/dpo-0.2/ckpt.pt").exists()
    assert cli("--resume", folder=tmp_path).returncode == 0
    for name in ("ipo-0.2", "dpo-0.2"):
        weights = [torch.load(tmp_path / out / name / "ckpt.pt", weights_only=True)["model"].values() for out in ("whole", "out")]
        assert M.digest(weights[0]) == M.digest(weights[1])


def test_steps_may_be_raised(tmp_path):
    """The longer schedule from then on; the optimiser's moments are kept; the run says what it is."""
    assert cli(*WORLD_RUN, folder=tmp_path).returncode == 0
    rates, step = [], torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1])
        run = cli("--resume", "--steps", 30, folder=tmp_path)
    assert run.returncode == 0 and "resumed after step 24" in run.stdout and outcome(tmp_path / "out")[3] == 30
    assert rates == pytest.approx([1.5e-3 * (30 - s) / 15 for s in range(24, 30)])
    again = cli("--resume", folder=tmp_path)
    assert again.returncode == 0 and "resumed after step 30" in again.stdout and "30/30" not in again.stdout


REFUSED_RESUMES = {  # flags -> what the one line says
    "--resume --tau 0.5": "--tau [0.5] contradicts the run in out/, which has [0.2]; leave it out",
    "--resume --lr 0.1": "--lr 0.1 contradicts the run in out/, which has 0.0015; leave it out",
    "--resume --steps 20": "--steps 20: the run in out/ has 24; --resume can only raise them",
    "--resume --out nowhere": "--resume: nowhere/config.json is not that of a run (FileNotFoundError); name the --out of a run",
    "--resume --out bandit": "--resume: bandit/config.json is not that of a run (ValueError); name the --out of a run that has checkpoints (a bandit has none)",
    "--resume --out grid/ipo-0.2": "--resume: grid/ipo-0.2/config.json is not that of a run (TypeError)",
    "--resume --data d1": "--data d1 contradicts the run in out/, which has bt; leave it out",
    "--steps 5": "--out out: holds a run; go on with it (--resume), replace it (--overwrite) or name another folder",
    "--data d1": "--out out: holds a run; go on with it (--resume), replace it (--overwrite) or name another folder"}


def test_what_contradicts_a_run_is_refused(tmp_path):
    """One line each, and the run's files are as they were."""
    assert cli(*WORLD_RUN, folder=tmp_path).returncode == 0
    assert cli("--data", "d1", *BANDIT, "--out", "bandit", folder=tmp_path).returncode == 0
    assert cli(*WORLD_RUN, "--loss", "ipo", "dpo", "--out", "grid", folder=tmp_path).returncode == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for command, message in REFUSED_RESUMES.items():
        run = cli(*command.split(), folder=tmp_path)
        assert run.returncode == 2 and run.stderr.startswith(f"ipo.py: {message}") and run.stderr.count("\n") == 1, (command, run.stderr)
    assert cli("--resume", "--tau", 0.2, "--out", "out", folder=tmp_path).returncode == 0  # flags that agree
    for path in kept:
        assert path.name in ("report.json", "metrics.jsonl", "config.json") or path.read_bytes() == kept[path]
    assert cli(*WORLD_RUN, "--overwrite", "--seed", 1, folder=tmp_path).returncode == 0
    assert (tmp_path / "out/ckpt.pt").read_bytes() != kept[tmp_path / "out/ckpt.pt"]


def test_overwrite_removes_all_or_nothing(tmp_path):
    """A folder where a file of the run must go is found before the run of before is removed."""
    assert cli(*WORLD_RUN, folder=tmp_path).returncode == 0
    (tmp_path / "out/report.json").unlink()
    (tmp_path / "out/report.json").mkdir()
    kept = (tmp_path / "out/ckpt.pt").read_bytes()
    run = cli(*WORLD_RUN, "--overwrite", folder=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("ipo.py: out: holds a folder of the name") and run.stderr.count("\n") == 1
    assert (tmp_path / "out/ckpt.pt").read_bytes() == kept


def test_changed_data_and_foreign_checkpoints_are_refused(tmp_path):
    """Another pair in the file, a reference or a policy of another run, a checkpoint that was cut, a config that is none."""
    path = pathlib.Path(some_pairs(tmp_path))
    assert cli(*FILE_RUN, folder=tmp_path).returncode == 0 and cli(*FILE_RUN, "--seed", 1, "--out", "other", folder=tmp_path).returncode == 0
    kept = {name: (tmp_path / "out" / name).read_bytes() for name in ("ref.pt", "ckpt.pt", "config.json")}

    def refused(name, data, message):
        (tmp_path / "out" / name).write_bytes(data)
        run = cli("--resume", folder=tmp_path)
        (tmp_path / "out" / name).write_bytes(kept[name])
        assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1, (message, run.stderr)
    refused("ref.pt", (tmp_path / "other/ref.pt").read_bytes(), "--resume: --data pairs.jsonl is not what the run in out/ was made with, or its ref.pt has been replaced")
    metrics = (tmp_path / "out/metrics.jsonl").read_bytes()
    refused("ckpt.pt", (tmp_path / "other/ckpt.pt").read_bytes(), "out/ckpt.pt belongs to another run than the ref.pt and flags here")
    assert cli(*FILE_RUN, "--init_from", "out/ref.pt", "--out", "x", folder=tmp_path).returncode == 2  # sizes are fixed by it
    theirs = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    torch.save(theirs | {"digest": theirs["digest"].replace("ipo", "dpo")}, tmp_path / "dpo.pt")
    refused("ckpt.pt", (tmp_path / "dpo.pt").read_bytes(), "out/ckpt.pt belongs to another run than the ref.pt and flags here")
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == metrics
    refused("ckpt.pt", kept["ckpt.pt"][:1000], "out/ckpt.pt: not a nanoIPO checkpoint, or a damaged one")
    refused("ref.pt", b"", "out/ref.pt: not a nanoIPO checkpoint, or a damaged one")
    refused("config.json", b"{}", "out/config.json is not that of a run (KeyError)")
    refused("config.json", b"[", "out/config.json is not that of a run (JSONDecodeError)")
    path.write_text(path.read_text().replace("good 3", "good 33"))
    run = cli("--resume", folder=tmp_path)
    assert run.returncode == 2 and "--data pairs.jsonl is not what the run in out/ was made with" in run.stderr


def test_a_checkpoint_executes_nothing(tmp_path):
    """A pickle that would run code is refused unread."""
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    torch.save({"model": Evil(), "config": {}, "tokenizer": "bytes"}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in "a.pt", "b.pt":
        run = cli("--init_from", name, folder=tmp_path)
        assert run.returncode == 2 and "not a nanoIPO checkpoint" in run.stderr and not (tmp_path / "evil").exists()


def test_a_full_disk_is_told_before_or_after(tmp_path, monkeypatch):
    """Too little room is found before training; a save that fails names the file, and the checkpoint of before is whole."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: Namespace(free=1000))
        run = cli(*WORLD_RUN, folder=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("ipo.py: --out out: 0.00 GiB are free and checkpoints take up to") and not (tmp_path / "out/config.json").exists()
    saved = []

    def full(value, file):
        saved.append(1)
        if len(saved) == 4:
            raise OSError(28, "No space left on device")
        return save(value, file)
    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        run = cli(*WORLD_RUN, folder=tmp_path)
    assert run.returncode == 1 and run.stderr == "ipo.py: out/ckpt.pt: cannot be written (No space left on device); what it held before is still there; make room, then --resume\n"
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 10
    assert cli(*WORLD_RUN, "--out", "whole", folder=tmp_path).returncode == cli("--resume", folder=tmp_path).returncode == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_starts_where_theory_says_and_ends_alike(tmp_path, dtype):
    """Step 0 in every dtype; after 60 steps KL(pi||ref) within a tenth of float32's, log-probs in float32."""
    flags = [*SHORT, "--steps", 60, "--pairs", 5000]
    ends = {}
    for name in "float32", dtype:
        run = cli(*flags, "--dtype", name, "--out", name, folder=tmp_path)
        assert run.returncode == 0 and "step 0: loss 6.25, theory 6.25" in run.stdout, run.stderr
        ends[name] = json.loads((tmp_path / name / "report.json").read_text())["after"]
    assert ends[dtype]["kl_ref"] == pytest.approx(ends["float32"]["kl_ref"], rel=0.1) and ends[dtype] != ends["float32"]
    model, tokens = tiny(V=11, T=8), torch.randint(11, (2, 8))
    with M.autocast(model, dtype):
        assert M.sequence_logp(model, tokens, torch.arange(8).expand(2, 8) > 3).dtype == torch.float32


def test_skipped_steps_are_told(tmp_path):
    """float16: gradients that overflow whatever their scale cost steps; how many is printed."""
    run = cli(*SHORT, "--steps", 6, "--tau", "1e-6", "--dtype", "float16", folder=tmp_path)
    assert run.returncode == 0 and re.search(r"float16: \d of 6 steps skipped", run.stdout), run.stderr


def torchrun(processes, *args, folder):
    code = ("import sys, ipo; ipo.psi = lambda q: q; clip = ipo.M.nn.utils.clip_grad_norm_; norms = []\n"
            "ipo.M.nn.utils.clip_grad_norm_ = lambda *a: (norms.append(clip(*a)), norms[-1])[1]\n"
            "status = ipo.main(); sys.stderr.write(' '.join(map(str, ['\\nnorms', *map(float, norms), '\\n']))); sys.exit(status)")
    (folder / "start.py").write_text(code)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "start.py", *map(str, args)],
                          cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})


def test_two_processes_train_like_one(tmp_path):
    """Same losses at the same global batch to 1e-5, an odd batch and --accum included; one process writes; what two began one can
    finish."""
    some_pairs(tmp_path)
    flags = [*FILE_RUN, "--batch_size", 7, "--log_every", 1, "--dropout", 0]
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: (norms.append(clip(*a)), norms[-1])[1])
        assert cli(*flags, "--out", "one", folder=tmp_path).returncode == 0
    two = torchrun(2, *flags, "--out", "two", folder=tmp_path)
    assert two.returncode == 0, two.stderr
    for line in re.findall(r"norms (.*)", two.stderr):  # of the gradients: Adam would hide a factor
        assert [float(v) for v in line.split()] == pytest.approx([v.item() for v in norms], rel=1e-3)
    assert two.stderr.count("norms ") == 2
    assert two.stdout.count("step 0: loss") == 1
    (_, one, report, _), (_, both, other, _) = (outcome(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(both) == 12
    for a, b in zip(one, both):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["chosen"] == pytest.approx(a["chosen"], abs=1e-4)
    assert other["after"]["loss"] == pytest.approx(report["after"]["loss"], rel=1e-5)
    taken = torchrun(2, *flags, "--out", "two", folder=tmp_path)
    assert taken.returncode != 0 and "ipo.py: --out two: holds a run; go on with it (--resume)" in taken.stderr
    more = cli("--resume", "--out", "two", "--steps", 14, folder=tmp_path), cli("--resume", "--out", "one", "--steps", 14, folder=tmp_path)
    assert [run.returncode for run in more] == [0, 0]
    assert outcome(tmp_path / "two")[1][-1]["loss"] == pytest.approx(outcome(tmp_path / "one")[1][-1]["loss"], rel=1e-4)


def test_a_process_that_dies_ends_the_run(tmp_path):
    """With a message and an exit status, not by waiting."""
    some_pairs(tmp_path)
    (tmp_path / "ipo_dies.py").write_text("")
    code = ("import os, sys, ipo\nbatch = ipo.D.PairData.batch\ncalls = []\n"
            "def dying(*a):\n    calls.append(1)\n    if len(calls) == 5 and os.environ['RANK'] == '1': os._exit(7)\n    return batch(*a)\n"
            "ipo.D.PairData.batch = dying\nsys.exit(ipo.main())\n")
    (tmp_path / "dies.py").write_text(code)
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "dies.py", *FILE_RUN, "--batch_size", "8"],
                         cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert run.returncode != 0 and "ipo.py: process 0: another has ended" in run.stderr and "dies.py\", line" not in run.stderr


@pytest.mark.parametrize("flags", ["--data d1", "--sample x", "--bench", "--batch_size 3 --accum 2"])
def test_what_several_processes_cannot_do_is_refused(tmp_path, monkeypatch, flags):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = cli(*flags.split(), folder=tmp_path)
    assert run.returncode == 2 and ("start it with python" in run.stderr or "less than --accum 2 x 2 processes" in run.stderr)


EXTREMES = {  # lines of a file and flags -> what the output says
    "tau 1e-4": ([pair()] * 4, ["--tau", "1e-4"], "theory 2.5e+07"), "tau 1e4": ([pair()] * 4, ["--tau", "1e4"], "theory 2.5e-09"),
    "one pair, in a larger batch": ([pair()], ["--batch_size", 5], "1 pairs to train on, 0 held out"),
    "one token": ([pair("a", "b")] * 2, ["--show", 1], "a["), "an empty prompt": ([pair(prompt="")] * 2, [], "2 empty prompts: the response"),
    "a full context": ([pair("c" * 62, "d")] * 2, [], "2 prompts cut from the left to fit 64 tokens"),
    "a prompt of 10,000 tokens": ([pair(prompt="p" * 10_000)] * 2, [], "2 prompts cut from the left to fit 64 tokens"),
    "other alphabets": ([pair("\U0001f600\u05d0\u202e\x00", "\u0639\u6f22")] * 2, ["--show", 1], "\\x00"),
    "certain the other way": ([pair(p=0.0)] * 2, [], "their target favours the rejected response"), "ties": ([pair(p=0.5)] * 2, [], "theory 0 ")}


@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_work_and_are_told(tmp_path, case):
    lines, flags, said = EXTREMES[case]
    path = write(tmp_path / "pairs.jsonl", *lines)
    run = cli("--data", path, "--tokenizer", "bytes", "--holdout", 0, "--steps", 3, "--sft_steps", 1, "--batch_size", 2, "--n_layer", 1, "--n_embd", 16,
              "--n_head", 2, "--block_size", 64, *flags, folder=tmp_path)
    assert run.returncode == 0 and said.replace("2 prompts", "2 of 2 prompts").replace("2 empty", "2 of 2 empty") in run.stdout, (run.stdout, run.stderr)
    report = json.loads((tmp_path / "out/report.json").read_text())["after"]
    assert all(math.isfinite(v) for v in report.values() if v is not None)


def test_bench_prints_one_line_and_writes_nothing(tmp_path):
    """Losses are those of the plain pass in file order, at a constant rate; nothing is left behind; the reference is that of these
    pairs alone."""
    path = write(tmp_path / "pairs.jsonl", *(pair(f"good {i}", f"bad {i * i}", f"question {i}?") for i in range(12)))
    hugging_face(tmp_path / "hf")
    run = cli("--bench", "--data", path, "--init_from", "hf", "--steps", 3, "--batch_size", 4, "--lr", 1e-2, "--logp", "mean", folder=tmp_path)
    assert run.returncode == 0 and run.stdout.count("\\n") <= 1, run.stderr
    numbers = json.loads(run.stdout)
    assert not (tmp_path / "out").exists() and len(numbers["losses"]) == 3 and numbers["losses"][0] == pytest.approx(25, rel=1e-5)
    assert 0 < numbers["padding"] < 1 and min(numbers[k] for k in ("step_s", "total_s", "floor_s", "peak_gib", "tokens_per_s")) > 0
    model, data = M.load_pretrained(str(tmp_path / "hf")), D.encode(D.read_jsonl(path), D.get_tokenizer("bytes"), 64)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0), []
    plain = lambda batch: torch.stack([model(t[None]).log_softmax(-1)[0, :-1].gather(1, t[1:, None])[:, 0][m[1:]].mean() for t, m in zip(*batch[:2])])
    refs = [plain(data.batch(index)).detach() for index in torch.arange(12).split(4)]
    for index, ref in zip(torch.arange(12).split(4), refs):
        loss = ((plain(data.batch(index)) - ref).view(2, 4).diff(dim=0).neg() - 5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert numbers["losses"] == pytest.approx(losses, rel=1e-3) and losses[2] != pytest.approx(25, rel=1e-2)
    for flags, message in ((["--steps", 4], "need 16 pairs and there are 12"), (["--plot"], "--plot means nothing with --bench"),
                           (["--tau", 1, 2], "--bench times one run"), (["--loss", "rebel"], "not finite")):
        wrong = cli("--bench", "--data", path, "--init_from", "hf", "--steps", 3, "--batch_size", 4, *flags, folder=tmp_path)
        assert wrong.returncode == 2 and message in wrong.stderr


def test_the_floor_counts_what_torch_counts():
    """FLOPs of forward and backward pass, by torch's own counter (attention by a loop) on the plain pass of rows that share
    nothing."""
    from torch.utils.flop_counter import FlopCounterMode
    model = M.GPT(M.GPTConfig(128, 301, 3, 2, 64))
    rows = [([i], [i + 9] * 100) for i in range(4)]
    pairs = D.PairData(*D.pack(rows), torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2), torch.arange(2), torch.arange(2))
    with FlopCounterMode(display=False) as counter:
        logits = model(pairs.rows(torch.arange(4))[0])
        logits.sum().backward()
    attention = sum(3 * 4 * 64 * (t + 1) for _ in range(3 * 4) for t in range(101))  # its kernel on the CPU is not counted
    assert M.flops(model, pairs, torch.arange(2)) == pytest.approx(counter.get_total_flops() + attention, rel=0.01)


def test_gradients_of_shared_prefixes_do_not_stall_in_bfloat16():
    """One prefix in a thousand rows: its gradient is the sum of a thousand ones. Added up in bfloat16 it would stop at 256."""
    tokens = torch.cat([torch.zeros(1000, 1, dtype=torch.int64), torch.arange(1000)[:, None]], 1)
    shared = M.Shared(tokens, torch.ones_like(tokens, dtype=torch.bool))
    x = torch.ones(1001, 1, dtype=torch.bfloat16, requires_grad=True)
    shared.spread(x).sum().backward()
    assert x.grad.max() == 1000 and x.grad.sum() == 2000


# ---------------------------------------------------------------------------------------------- the course: misreadings


def test_tau_pulls_to_the_reference_whatever_its_entropy():
    """More tau is not more exploration: towards a peaked reference the entropy of pi* falls as tau rises."""
    p = torch.tensor([[0.5, 0.1, 0.1], [0.9, 0.5, 0.5], [0.9, 0.5, 0.5]]).double()[None]
    ref, mu = torch.tensor([[0.98, 0.01, 0.01]]).double(), torch.full((1, 3), 1 / 3).double()
    entropy = [-(best.exp() * best).sum().item() for best in (D.optimum(ref.log(), p, mu, identity, tau) for tau in (0.1, 0.3, 1, 10))]
    assert entropy == sorted(entropy, reverse=True) and entropy[0] > 2 * entropy[-1]


def test_mu_matters_unless_psi_is_logit_under_bradley_terry():
    world, (ref, *_) = D.build_world("bt"), random_policies()
    mus = (8 * world.pstar.mean(-1)).softmax(-1), torch.full((4, 400), 1 / 400).double()  # good responses more often; all alike
    gap = lambda psi: D.kl(*(D.optimum(ref, world.pstar, mu, psi, 0.1) for mu in mus)).item()
    assert gap(torch.logit) < 1e-9 and gap(identity) > 0.01


def test_a_mean_log_ratio_can_only_fall():
    """Over the reference's own responses it is -KL(ref||pi): whatever is learned, it falls; pairs raise the difference."""
    world, (ref, *_) = D.build_world("bt"), random_policies()
    best = D.optimum(ref, world.pstar, ref.exp(), identity, 0.2)
    assert (ref.exp() * (best - ref)).sum(-1).mean().item() == pytest.approx(-D.kl(ref, best).item()) and D.kl(ref, best) > 0.1


@pytest.mark.parametrize("name", ["bt", "deterministic", "cyclic"])
def test_log_ratios_of_ipos_optimum_are_at_most_one_over_tau_apart(name):
    """g is a mean of probabilities; DPO's optimum, under Bradley-Terry, has (r - r')/tau."""
    world, (ref, *_), mu = D.build_world(name), random_policies(), torch.full((4, 400), 1 / 400).double()
    apart = lambda psi: (lambda f: (f.amax(-1) - f.amin(-1)).max().item())(D.optimum(ref, world.pstar, mu, psi, 0.2) - ref)
    assert 0.5 / 0.2 < apart(identity) <= 1 / 0.2
    if name == "bt":  # the largest and the smallest reward: three times "superb", three times "awful"
        assert apart(torch.logit) == pytest.approx((2.7 + 2.7) / 0.2, rel=1e-6)


def test_the_scaled_square_is_another_loss():
    """(beta h - 1/(2 beta))^2 asks for 1/(2 beta^2) = 50 nats at 0.1, ten times what eq. 17 asks for."""
    h, tau = torch.linspace(0, 100, 10_001, dtype=torch.float64), 0.1
    assert h[((tau * h - 1 / (2 * tau)) ** 2).argmin()] == pytest.approx(50) and h[ipo.ipo_loss(h, torch.ones(1), tau).argmin()] == pytest.approx(5)


# ---------------------------------------------------------------------------------------------- the course: exercises


def answer(number):
    if ANSWERS[number] is None:
        pytest.skip(f"exercise {number}: no answer yet (ANSWERS in test_ipo.py)")
    return ANSWERS[number]


def targets(psi, p, tau=0.1):
    return ipo.target(p, tau, psi)


def admissible(psi):
    """psi on a grid of [0,1]; fails with a hint unless it is a function of a tensor that never falls."""
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    value = psi(q.clone())
    assert isinstance(value, torch.Tensor) and value.shape == q.shape and value.dtype != torch.bool, \
        "hint: psi takes a tensor and returns numbers of the same shape; (q > 0.5).to(q.dtype) makes numbers of a condition"
    assert not value.isnan().any(), "hint: psi is NaN somewhere in [0,1]; which operation is undefined there?"
    assert (value.diff() >= -1e-12).all(), "hint: a Psi never falls: a response that more people prefer is not worth less"
    return q, value


def test_exercise_psi_between_the_banners(monkeypatch):
    """What stands in ipo.py is a Psi, and the squared target leads to the exact optimum of its odd part."""
    admissible(YOURS)
    monkeypatch.setattr(ipo, "psi", YOURS)
    p, mu, ref = random_problem(0)
    odd = lambda q: (YOURS(q) - YOURS(1 - q)) / 2
    assert targets(YOURS, p).isfinite().all(), "hint: infinite for 0 < p < 1, so even soft labels have no target"
    minimiser = (ref.log() + tabular_minimiser(p, mu, 0.5)).softmax(0)
    assert torch.allclose(minimiser, D.optimum(ref.log()[None], p[None], mu[None], odd, 0.5)[0].exp(), atol=1e-6), \
        "hint: Psi must depend on q alone; does yours draw random numbers or remember?"


def test_exercise_01_step_0():
    for tau in (0.05, 0.2, 0.5, 2):
        right = math.isclose(float(answer("01")(tau)), ipo.ipo_loss(torch.zeros(1), torch.ones(1), tau).item(), rel_tol=1e-5)
        assert right, "hint: at step 0 pi = ref, so every margin is 0; put h = 0 and p = 1 into (h - target(p))^2"


def test_exercise_02_half_of_tau():
    asked, start, kl = map(float, answer("02"))
    world = D.build_world("bt")
    ref, mu = world.base.log().expand(4, -1), torch.full((4, 400), 1 / 400).double()  # what a run's reference is trained on
    moved = [D.kl(D.optimum(ref, world.pstar, mu, identity, tau), ref).item() for tau in (0.2, 0.1)]
    one = torch.ones(1)
    right = [math.isclose(asked, (targets(identity, one, 0.1) / targets(identity, one, 0.2)).item(), rel_tol=1e-4),
             math.isclose(start, (ipo.ipo_loss(0 * one, one, 0.1) / ipo.ipo_loss(0 * one, one, 0.2)).item(), rel_tol=1e-4),
             math.isclose(kl, moved[1] / moved[0], rel_tol=0.1)]
    assert right[0], "hint: the target is 1/(2 tau)"
    assert right[1], "hint: at step 0 the loss is the target, squared"
    assert right[2], "hint: differences of log pi*/ref double, and a small KL is about half the variance of log pi*/ref, but pi* is far from ref here; " \
        "read KL(pi||ref) of the optimum off both reports"


def test_exercise_03_logit():
    for tau in (0.05, 0.1, 0.3):
        p = torch.as_tensor(answer("03")(tau), dtype=torch.float64)
        right = 0.5 < p < 1 and math.isclose(ipo.target(p, tau, torch.logit).item(), 10, rel_tol=1e-3)
        assert right, \
            "hint: logit(p) - logit(1-p) = 2 logit(p); set the target to 10 and solve for p"


def test_exercise_04_same_targets():
    psi = answer("04")
    q, value = admissible(psi)
    assert torch.allclose(targets(psi, q), targets(identity, q), atol=1e-9), \
        "hint: Psi(q) - Psi(1-q) must be 2q - 1; what may be added to q that is the same at q and 1-q?"
    assert value.diff(n=2).abs().max() > 1e-9, "hint: this is affine; add something that bends"
    assert value.diff(n=3).abs().max() > 1e-12, "hint: this is q^2 times something plus an affine part; bend it another way"


def test_exercise_05_majority():
    _, value = admissible(psi := answer("05"))
    at = psi(torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0]))
    assert at.tolist() == [0, 0, 0.5, 1, 1], f"hint: at 0, .49, .5, .51, 1 it is {at.tolist()}; torch.sign has three values, as needed"


def test_exercise_06_hard_labels():
    for psi, p, tau in itertools.product([*ODD_PSI.values(), torch.square], (0.5, 0.6, 0.75, 0.9), (0.1, 0.5)):
        if psi is torch.logit:
            continue  # infinite at certain labels
        coin = p * targets(psi, torch.ones(1).double(), tau) + (1 - p) * targets(psi, torch.zeros(1).double(), tau)
        right = math.isclose(float(answer("06")(psi, torch.tensor(p).double(), tau)), coin.item(), rel_tol=1e-5, abs_tol=1e-5)
        assert right, \
            "hint: a hard label is 1 or 0: average target(1) with weight p and target(0) with weight 1-p; Psi is seen at 0 and 1 only"


def test_exercise_07_a_psi_to_order():
    q, _ = admissible(psi := answer("07"))
    wanted = torch.sign(q - 0.5) * ((q - 0.5).abs() - 0.1).clamp(min=0) / 0.4 / (2 * 0.1)
    off = (targets(psi, q) - wanted).abs()
    assert off.max() < 1e-3, f"hint: at p = {q[off.argmax()]:.3f} the target is {targets(psi, q)[off.argmax()]:.3f} at tau 0.1, not " \
        f"{wanted[off.argmax()]:.3f}; an odd Psi is tau times its own target"


def test_exercise_08_a_cycle_with_a_favourite():
    p = torch.as_tensor(answer("08"), dtype=torch.float64)
    assert p.shape == (3, 3) and torch.allclose(p + p.T, torch.ones(3, 3).double()), "hint: p*(y>y') + p*(y'>y) = 1, so 1/2 on the diagonal"
    assert ((0 <= p) & (p <= 1)).all() and min(p[0, 1], p[1, 2], p[2, 0]) > 0.5, "hint: p[0,1], p[1,2] and p[2,0] must exceed 1/2 for a > b > c > a"
    mu = torch.full((1, 3), 1 / 3).double()
    best = D.optimum(mu.log(), p[None], mu, identity, 0.1).exp()[0]
    assert best[0] > 0.75, f"hint: pi* = {[round(x, 3) for x in best.tolist()]}; it weighs the mean of p* over all opponents: let a win high and lose by a hair"


def test_exercise_09_mean_against_sum():
    for tau, L in ((0.1, 1), (0.2, 4), (0.5, 7)):
        mean_tau, h = float(answer("09")(tau, L)), torch.linspace(0, 20, 200_001, dtype=torch.float64)
        best = h[ipo.ipo_loss(h / L, torch.ones(1), mean_tau).argmin()]
        assert best.item() == pytest.approx(1 / (2 * tau), abs=1e-3), \
            f"hint: with your tau the loss of h/{L} is least at h = {best:.2f}, the sum's at {1 / (2 * tau):.2f}; solve h/L = 1/(2 tau_mean)"


def test_exercise_10_figure_1():
    world = D.build_bandit("d1", 1)
    mu = torch.full((1, 3), 1 / 3).double()
    for tau in (0.1, 0.3, 1, 2):
        given, due = [float(x) for x in answer("10")(tau)], D.optimum(mu.log(), world.pstar, mu, identity, tau).exp()[0].tolist()
        right = np.allclose(given, due, atol=1e-3)
        assert right, "hint: pi*(y) is proportional to exp(g(y)/tau), g(y) the mean of p*(y>y') over the three opponents, y itself (1/2) included"


def test_exercise_11_a_loss_of_your_own():
    names = [name for name in ipo.LOSSES if name not in ("ipo", "rebel", *SLOPES)]
    if not names:
        pytest.skip("exercise 11: no new entry in LOSSES yet (ipo.py)")
    for name in names:
        h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        ipo.LOSSES[name](h, torch.ones(1), 1.0).sum().backward()
        assert h.grad < 0, f"hint: the slope of {name} at h = 0 is {h.grad.item():.3f}: a first step must move towards the chosen response"
        z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
        for p, tau in itertools.product(torch.linspace(0.05, 0.95, 19, dtype=torch.float64), (1.0, 0.5)):
            loss = functools.partial(ipo.LOSSES[name], p=p, tau=tau)
            values = loss(z / tau)
            assert values.isfinite().all(), f"hint: {name} is not finite for tau h in [-12, 12]; which term overflows?"
            assert torch.allclose(values, ipo.LOSSES[name](-z / tau, 1 - p, tau)), \
                "hint: swapping the responses and their probability must change nothing; both_ways takes care of it"
            least = f"at p = {p:.2f}, tau {tau} the minimiser is tau h = {z[values.argmin()]:.3f}"
            assert name in ipo.LINK, f"hint: {least}; add to LINK the function of p that gives it at every p"
            link = lambda q: torch.as_tensor(ipo.LINK[name](q), dtype=torch.float64)
            asked = ipo.target(p, 1.0, link)
            assert loss(asked / tau) <= values.min() + 1e-6, f"hint: {least}, and LINK asks for {asked:.3f}; where is the slope p f'(z) - (1-p) f'(-z) zero?"


def test_exercise_12_another_mu():
    """The marked line gives a distribution over responses; on pairs drawn from it the loss is least at the pi* of that mu."""
    world, (ref, *_) = D.build_world("bt"), random_policies()
    mu, again = (ipo.response_distribution(ref, options()) for _ in range(2))
    edited = mu.shape != ref.shape or not torch.allclose(mu.double(), torch.full_like(ref, 1 / 400))
    if not edited and ANSWERS["12"] is None:
        pytest.skip("exercise 12: mu is uniform still (ipo.py) and there is no answer yet (ANSWERS in test_ipo.py)")
    assert edited, "hint: the answer is there, but mu is uniform still; edit the marked line of response_distribution in ipo.py"
    assert mu.shape == ref.shape and mu.dtype == ref.dtype, f"hint: mu must be like ref, (X,Y) and {ref.dtype}; yours is {tuple(mu.shape)}, {mu.dtype}"
    assert torch.equal(mu, again), "hint: mu changes from call to call; pairs would be drawn from one and the optimum be that of another"
    assert torch.allclose(mu.sum(-1), torch.ones(4).double()), "hint: each row of mu must sum to 1; divide by .sum(-1, keepdim=True)"
    assert (mu > 0).all(), "hint: a response that never occurs is in no pair, so nothing fixes its margin; give it some probability"
    f = D.optimum(ref, world.pstar, mu, identity, 0.5) - ref
    residual = f[:, :, None] - f[:, None, :] - ipo.target(world.pstar, 0.5)
    assert (residual * mu[:, None, :]).sum(-1).abs().max() < 1e-9  # the slope of the expected loss in each f(y)
    name, mus = answer("12"), ((8 * world.pstar.mean(-1)).softmax(-1), torch.full((4, 400), 1 / 400).double())  # good responses more often; all alike
    assert name in ("identity", "logit", "tanh", "cubic"), "hint: the answer is one of --psi's names: identity, logit, tanh, cubic"
    gap = D.kl(*(D.optimum(ref, world.pstar, m, ipo.PSI[name], 0.1) for m in mus))
    assert gap < 1e-9, f"hint: with {name} pi* moves by {gap:.4f} nats; which Psi makes of p*(y>y') a difference r - r'?"


def test_exercise_13_the_silent_bug(tmp_path):
    if not answer("13"):
        pytest.skip("exercise 13: no answer yet (ANSWERS in test_ipo.py)")
    for number, test in answer("13").items():
        name = test.partition("[")[0]
        assert number in range(1, len(BUGS) + 1) and name.startswith("test_") and name in globals(), f"hint: {number!r}: {test!r} is no bug or no test of this file"
        assert not re.search("exercise|silent_bug|readme|marked_table|six_rooms|links", name), f"hint: {name} reads the text of files; name a test that runs the code"
        assert buggy(tmp_path / f"{number} clean", 0, test).wait() == 0, f"hint: {test} does not pass without the bug, with your other edits; undo them"
        assert buggy(tmp_path / str(number), number, test).wait() == 1, f"hint: with bug {number}, {BUGS[number - 1][0]}, {test} does not fail; " \
            "what does this line compute, and which test compares that with a number from elsewhere?"


# ----------------------------------------------------------------------------------------------- the course: silent bugs

SOURCES = ("ipo.py", "model.py", "data.py", "test_ipo.py")
BUGS = [  # what, file, the line (a part of it that stands there once), what it becomes, a test that fails
    ("mask shifted by one", "model.py", "row, t = mask[:, 1:].nonzero(", "row, t = mask[:, :-1].nonzero(", "test_sequence_logp_is_the_product_of_conditionals"),
    ("prompt scored", "data.py", "real & (t >= self.prompt_len[rows, None])", "real & (t >= 1)", "test_tokens_of_a_pair"),
    ("padding scored", "data.py", "real & (t >= self.prompt_len[rows, None])", "(t >= self.prompt_len[rows, None])", "test_tokens_of_a_pair"),
    ("winner and loser swapped", "ipo.py", "return chosen - rejected", "return rejected - chosen", "test_margin_is_chosen_minus_rejected_and_needs_the_reference"),
    ("reference not frozen", "ipo.py", "h = margin(logp, ref) ", "h = margin(logp, logp.detach()) ", "test_the_bandit_reaches_the_exact_optimum"),
    ("mean for sum", "model.py", "return total / mask.sum(1) if mean else total", "return total / mask.sum(1)", "test_sequence_logp_is_the_product_of_conditionals"),
    ("pads in the length", "model.py", "return total / mask.sum(1) if mean else total", "return total / mask.shape[1] if mean else total", "test_padding_never_changes_a_log_prob"),
    ("end of text unscored", "data.py", "yield prompt, chosen + [eot]", "yield prompt, chosen", "test_tokens_of_a_pair"),
]


def buggy(folder, number, test):
    """A copy of the sources with that bug (0: with none), and `test` of the suite running on it: a process."""
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(HERE / name, folder)
    if number:
        _, name, line, becomes, _ = BUGS[number - 1]
        text = (folder / name).read_text()
        assert text.count(line) == 1, f"{name}: {line!r} stands there {text.count(line)} times"
        (folder / name).write_text(text.replace(line, becomes))
    return subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"test_ipo.py::{test}"], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_every_silent_bug_of_the_readme_is_caught(tmp_path):
    """Mutation testing in small: the named test fails on a copy with the bug (pytest's status 1), and passes without it."""
    clean = buggy(tmp_path / "0", 0, "test_tokens_of_a_pair")
    caught = [buggy(tmp_path / str(n), n, bug[-1]) for n, bug in enumerate(BUGS, 1)]
    assert clean.wait() == 0 and [process.wait() for process in caught] == [1] * len(BUGS)
    for n, (what, name, line, becomes, test) in enumerate(BUGS, 1):
        assert f"| {n} | {what} | {name} | `{line.strip()}` | `{becomes.strip()}` | {test} |" in README


# ------------------------------------------------------- the course: measured tables (`python test_ipo.py NAME` makes them anew)


def measured(flags):
    """{(loss, tau): report} of `python ipo.py FLAGS`, in full."""
    with tempfile.TemporaryDirectory() as folder:
        run = cli(*flags.split(), folder=folder)
        assert run.returncode == 0, (flags, run.stderr)
        report, args = json.loads(pathlib.Path(folder, "out/report.json").read_text()), ipo.parse(flags.split())
    keys = list(itertools.product(args.loss, args.tau))
    return {(loss, tau): report[f"{loss}-{tau:g}"] if len(keys) > 1 else report for loss, tau in keys}


def unmeasured(flags):
    """The same with all numbers 0: the flags are only read."""
    args = ipo.parse(flags.split())
    zeros = collections.defaultdict(float, pi=[0.0] * (2 if args.data == "bandit2" else 3))
    return {key: dict.fromkeys(("before", "after", "optimum", "labels", "nearest"), zeros) for key in itertools.product(args.loss, args.tau)}


def show(value, digits=3):
    return "infinite" if value is None else f"{value:z.{digits}f}"


def both(report, key):  # of the policy, and of pi*
    return ", ".join(show(report[column][key]) for column in ("after", "optimum"))


def middle(values):
    """Median and range."""
    values = sorted(values)
    return f"{show(values[len(values) // 2], 4)} ({show(values[0], 4)} to {show(values[-1], 4)})"


def table_seeds(run):
    grids = [run(f"--tau 0.1 0.2 0.5 --seed {seed}") for seed in range(5)]
    for tau in (0.1, 0.2, 0.5):
        best, before = (sorted(grid["ipo", tau][column][key] for grid in grids)[2] for column, key in (("optimum", "kl_ref"), ("before", "kl_opt")))
        yield f"{tau:g}", show(best), show(before), middle(grid["ipo", tau]["after"]["kl_opt"] for grid in grids)


def table_settings(run):
    for flags, note in (("--labels soft", "no coin flips"), ("--mu ref", "pairs from the reference"), ("--data cyclic", "intransitive"),
                        ("--data deterministic", "certain, but for ties"), ("--data lengths", "one to seven tokens"),
                        ("--loss dpo", "pi\\* is that of Psi = logit"), ("--data cyclic --loss dpo", "its minimiser is not pi\\*"),
                        ("--pairs 2000 --tau 0.1 --steps 300", "few pairs"), ("--pairs 2000 --tau 0.1 --steps 10000", "their noise is learned")):
        seeds = [report for seed in range(3) for report in run(f"{flags} --seed {seed}").values()]
        moved, best = (sorted(report[column]["kl_ref"] for report in seeds)[1] for column in ("after", "optimum"))
        yield f"`{flags}`: {note}", show(moved), show(best), middle(report["after"]["kl_opt"] for report in seeds)


def table_grid(run):
    for (loss, tau), report in run("--loss ipo dpo --tau 0.1 0.2 0.5 1").items():
        after = report["after"]
        yield f"{loss}, {tau:g}", both(report, "kl_ref"), show(after["kl_opt"], 4), both(report, "win"), show(after["ratio"], 1), show(after["below"], 4)


def table_certain(run):
    cell = lambda numbers: f"{show(numbers['kl_ref'], 2)}; {show(numbers['ratio'], 1)}"
    grids = [run(f"--data deterministic --loss ipo dpo --tau 0.1 1 --steps {steps}") for steps in (100, 1000, 10_000)]
    for loss, tau in grids[0]:
        yield f"{loss}, {tau:g}", *(cell(grid[loss, tau]["after"]) for grid in grids), cell(grids[0][loss, tau]["optimum"])


def table_few(run):
    four = [("ipo", 0.05), ("ipo", 0.2), ("dpo", 0.2), ("dpo", 1)]
    for flags, shown in (("--data bt --pairs 1000", four), ("--data bt --pairs 1000 --labels soft", four[1::2]), ("--data bt --pairs 10000", four[1::2]),
                         ("--data bt --pairs 100000", four[1::2]), ("--data deterministic --pairs 1000", [("ipo", 0.02), *four]),
                         ("--data deterministic --pairs 10000", four[1::2]), ("--data deterministic --pairs 100000", four[1::2])):
        taus = sorted({tau for _, tau in shown})
        reports = run(f"{flags} --loss ipo dpo --tau {' '.join(map(str, taus))}")
        for loss, tau in shown:
            r = reports[loss, tau]
            yield f"`{flags}`", f"{loss}, {tau:g}", both(r, "kl_ref"), show(r["after"]["kl_opt"]), both(r, "win"), show(r["after"]["below"])


def table_bandits(run):
    for data, pairs in D.BANDITS.items():
        reports = run(f"--data {data} --loss ipo dpo")
        for tau in (0.1, 0.5, 1.0):
            pi = lambda loss, column: " ".join(map(show, reports[loss, tau][column]["pi"]))
            yield f"`{data}`: {pairs}; {tau:g}", pi("ipo", "after"), pi("ipo", "optimum"), pi("dpo", "after")


def table_psi(run):
    for psi in ("identity", "logit", "tanh", "cubic"):
        report, = run(f"--psi {psi} --labels soft").values()
        yield psi, show(report["after"]["kl_ref"]), show(report["optimum"]["kl_ref"]), show(report["after"]["kl_opt"], 4)


def table_family(run):
    names = "ipo dpo savage exponential squared_hinge slic exo robust discopop simpo"
    hard, soft = run(f"--tau 1 --loss {names}"), run(f"--tau 1 --labels soft --loss rebel {names}")
    gap = lambda reports, name: show(reports[name, 1.0]["after"]["kl_opt"], 4)
    for name in ("ipo", "dpo", "rebel", *names.split()[2:]):
        yield name, show(soft[name, 1.0]["optimum"]["kl_ref"]), "refused" if name == "rebel" else gap(hard, name), gap(soft, name)
    noisy = run("--tau 1 --loss robust dpo --noise 0.1 --label_noise 0.1")
    for label, reports, name in (("savage, `--lr 3e-4`", run("--tau 1 --loss savage --lr 3e-4"), "savage"),
                                 ("robust, `--noise 0.1`", noisy, "robust"), ("dpo, `--noise 0.1`", noisy, "dpo")):
        yield label, show(reports[name, 1.0]["optimum"]["kl_ref"]), gap(reports, name), ""


def table_length(run):
    one = run("--data lengths --mu ref")["ipo", 0.2]["after"]["kl_opt"]
    yield "sum, 0.2", show(one, 4), show(one, 4), "0", ""
    for (_, tau), report in run("--data lengths --mu ref --logp mean --tau 0.2 0.5 0.8 1.1 1.5").items():
        after, near = report["after"], report["nearest"]
        yield f"mean, {tau:g}", show(after["kl_opt"]), show(after["kl_fit"], 4), show(report["labels"]["kl_opt"]), f"tau {near['tau']:.2f}: {show(near['kl_opt'])}"


def table_memory(_):
    for name, layers, heads, channels in (("124M", 12, 12, 768), ("355M", 24, 16, 1024), ("774M", 36, 20, 1280), ("1.5B", 48, 25, 1600)):
        with torch.device("meta"):
            model = M.GPT(M.GPTConfig(n_layer=layers, n_head=heads, n_embd=channels))
        rows = D.pack(([0] * 512, [i] * 512) for i in range(4))
        two = D.PairData(*rows, torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2), torch.arange(2), torch.arange(2))
        per, fits = [], []
        for model.recompute in (False, True):
            need = [M.memory(model, two, n, "bfloat16") for n in (1, 2)]
            per.append((need[1]["activations"] - need[0]["activations"]) / 2**30)
            fixed, logits = need[1]["weights, gradients, Adam"] / 2**30, need[1]["logits"] / 2**30
            fits.append([max(0, int((card - 1 - fixed - logits) / per[-1])) for card in (24, 80, 141)])
        yield name, show(fixed, 1), ", ".join(show(p, 2) for p in per), *(", ".join(map(str, pair)) for pair in zip(*fits))


TABLES = {name.removeprefix("table_"): function for name, function in list(globals().items()) if name.startswith("table_")}


def readme_tables():
    """{what stands behind `measured:`: the rows below it, as lists of cells}"""
    marked = re.findall(r"<!-- measured: (.*?) -->\n+((?:\|.*\n)*)", README)
    return {command: [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()[2:]] for command, table in marked}


def test_every_marked_table_is_the_one_that_its_command_makes():
    """Rows, labels and kinds of cells; the numbers are left out here, since full runs take minutes: `python test_ipo.py` compares them."""
    tables = {command.removeprefix("python test_ipo.py "): rows for command, rows in readme_tables().items() if "test_ipo.py" in command}
    assert tables.keys() == TABLES.keys()
    shape = lambda cells: [cells[0], *(re.sub(r"-?\d[\d,]*(\.\d+)?|infinite", "#", cell) for cell in cells[1:])]
    for name, rows in tables.items():
        assert [shape(row) for row in rows] == [shape(row) for row in TABLES[name](unmeasured)], name
    assert [list(row) for row in table_memory(None)] == tables["memory"]  # arithmetic: no run


def test_tables_are_made_of_reports():
    """Every number that a table asks of a report is in the report of a run."""
    short = {"--data d1": "--seeds 2 --steps 3", "--data lengths --logp mean": "--steps 3 --pairs 500 --sft_steps 3"}
    for flags, cut in short.items():
        real, fake = measured(f"{flags} {cut}"), unmeasured(flags)
        assert real.keys() == fake.keys()
        report = next(iter(real.values()))
        asked = {"kl_ref", "kl_opt", "win", "ratio", "below"} | ({"pi"} if "d1" in flags else {"kl_fit"})
        assert asked <= report["after"].keys() and asked - {"below"} <= report["optimum"].keys()
        assert "d1" in flags or {"tau", "kl_opt"} <= report["nearest"].keys() and "kl_opt" in report["labels"]


def remeasure(names):
    """Runs the tables' commands in full, prints the tables and, of the README's rows, those that differ; returns how many."""
    ipo.psi, differ, there = identity, 0, readme_tables()
    for name in names or TABLES:
        for row, old in itertools.zip_longest(map(list, TABLES[name](measured)), there.get(f"python test_ipo.py {name}", []), fillvalue=[]):
            print(f"| {' | '.join(row)} |", flush=True)
            if row != old:
                print(f"  README: | {' | '.join(old)} |")
                differ += 1
    return differ


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - TABLES.keys():
        sys.exit(f"test_ipo.py: no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    sys.exit(min(remeasure(sys.argv[1:]), 1))
