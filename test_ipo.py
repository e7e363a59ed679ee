"""Claims about nanoIPO, each with its proof or oracle. `pytest -q test_ipo.py`: a minute or two.

Oracles: enumeration of all responses, closed forms, independent numpy, brute force token by token, GPT-2 of
transformers, torch's Adam. Every test runs with the paper's Psi(q) = q or one of its own, whatever a student
made of `psi` in ipo.py. The last section is about README.md.
"""
import ast
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tokenize
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from pytest import approx
from torch.overrides import TorchFunctionMode

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test goes online
import data  # noqa: E402
import ipo  # noqa: E402
import model  # noqa: E402

torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
HERE = Path(__file__).parent
WORLD = "--steps 20 --pairs 2000 --sft_steps 5 --batch_size 32 --log_every 10".split()
FILE = "--tokenizer bytes --steps 6 --sft_steps 3 --batch_size 4 --n_layer 1 --n_embd 16".split()
FILE += ["--log_every", "2"]
cases = pytest.mark.parametrize


# --------------------------------------------------------------------------------------- what the tests share

def identity(q):
    return q


def steep(q):
    """A Psi that is odd about 1/2 and not linear."""
    return torch.tanh(8 * (q - 0.5))


@pytest.fixture(autouse=True)
def paper_psi(monkeypatch):
    """The paper's Psi; tables that a test extends are afterwards as they were."""
    monkeypatch.setattr(ipo, "psi", identity)
    monkeypatch.setattr(ipo, "LOSSES", dict(ipo.LOSSES))
    monkeypatch.setattr(ipo, "PSI_OF", dict(ipo.PSI_OF))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def numbers(text):
    """The numbers of a text, float64; "/" begins another row of a matrix."""
    rows = [row.split() for row in text.split("/")]
    table = f64([list(map(float, row)) for row in rows])
    return table if len(rows) > 1 else table[0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt(seed=0, std=0.3, **sizes):
    """A GPT with weights so large that no two tokens are equally likely."""
    torch.manual_seed(seed)
    small = {"block_size": 6, "vocab_size": 5, "head_size": 5,
             "n_layer": 2, "n_head": 2, "n_embd": 16}
    policy = model.GPT(model.GPTConfig(**small | sizes))
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=std)
    return policy


def byte_gpt(seed=0, **sizes):
    """A GPT for the tokens of --tokenizer bytes."""
    return gpt(seed, block_size=64, vocab_size=257, head_size=257, **sizes)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    same = [torch.equal(a[name], b[name]) for name in a]
    return all(same) and len(a) == len(b)


def options(*argv):
    """The flags of a run on the CPU."""
    return ipo.parse(["--device", "cpu", *map(str, argv)])


def cli(*argv, status=0, says=""):
    """The command line, in this process, ends with this status; returns what it prints.

    If the status is not 0, one line on stderr holds `says`.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = ipo.main(["--device", "cpu", *map(str, argv)])
    said = err.getvalue()
    assert ended == status, (argv, said)
    assert says in said, (argv, said)
    assert said.count("\n") == bool(status), said
    assert said.startswith("ipo.py: " * bool(status)), said
    return out.getvalue()


def refused(message, *argv):
    """The command is bad input: one line says so, status 2. Returns what was printed before it."""
    return cli(*argv, status=2, says=message)


def report(folder):
    return json.loads(Path(folder, "report.json").read_text())


def pair(chosen="good", rejected="bad", prompt="q: ", **more):
    """The object of one line of a JSONL file."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write(path, *lines):
    """A JSONL file of texts and objects; returns its name."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    text = "".join(text + "\n" for text in texts)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return str(path)


def rows_of_pairs(n=30):
    """Objects with three different p, and prompts of 11 or 12 bytes."""
    p = [0.2, 0.8, 1]
    return [pair(f"good {i}", f"bad {i}", f"question {i}?", p=p[i % 3])
            for i in range(n)]


def some_pairs(folder):
    return write(folder / "pairs.jsonl", *rows_of_pairs())


def encoded(*pairs, block_size=32):
    """PairData of objects, in bytes."""
    pairs = [data.Pair(**p) for p in pairs]
    return data.encode(pairs, data.get_tokenizer("bytes"), block_size)


# ------------------------------------------------------------------------------------------ target and losses

@cases("psi, targets", [
    (identity, "-5 0 1 2.5 4 4.9 5"),
    (steep, "-9.99 0 6.64 9.64 9.97 9.99 9.99"),
    (torch.logit, "-inf 0 4.05 10.99 21.97 45.95 inf"),
])
def test_target_of_each_psi(psi, targets):
    """(Psi(p) - Psi(1-p)) / 0.2 by hand; logit asks a certain pair for infinity: DPO's over-fitting."""
    ipo.psi = psi
    p = numbers("0 0.5 0.6 0.75 0.9 0.99 1")
    expected = numbers(targets).tolist()
    assert ipo.target(p, 0.1).tolist() == approx(expected, abs=8e-3)


def test_a_coin_flip_has_the_same_gradient_as_its_probability():
    """E_I (h - target(I))^2 and (h - target(p))^2 differ by a constant, so their slopes are equal."""
    h = torch.linspace(-9, 9, 7, dtype=torch.float64)
    won = ipo.ipo_loss(h, f64(1), 0.1)
    lost = ipo.ipo_loss(h, f64(0), 0.1)
    flips = 0.8 * won + 0.2 * lost
    difference = flips - ipo.ipo_loss(h, f64(0.8), 0.1)
    assert difference.std() < 1e-9


def test_targets_of_1_over_tau_and_0_are_the_target_of_1_over_2_tau():
    """((h - 1/tau)^2 + h^2) / 2 exceeds (h - 1/(2 tau))^2 by 1/(4 tau^2), for every h."""
    h = torch.linspace(-9, 9, 7, dtype=torch.float64)
    both = ((h - 1 / 0.1) ** 2 + h ** 2) / 2
    excess = both - ipo.ipo_loss(h, f64(1), 0.1)
    assert excess.tolist() == approx([25] * 7)


@cases("name, h, p, tau, slope", [
    ("ipo", 0, 1, 0.1, -10),
    ("ipo", 100, 1, 0.1, 190),
    ("ipo", 3, 0.3, 1, 6.4),
    ("dpo", 0, 1, 0.1, -0.05),
    ("dpo", 100, 1, 0.1, -4.5398e-6),
    ("dpo", 3, 0.3, 1, 0.652574),
    ("dpo", 0, 0, 2, 1),
])
def test_gradient_of_each_loss(name, h, p, tau, slope):
    """2 (h - target) and -tau (p - s(tau h)), by hand: at h = 100 IPO pulls back, DPO never does at p = 1."""
    x = f64([h]).requires_grad_()
    ipo.LOSSES[name](x, f64([p]), tau).sum().backward()
    assert x.grad.item() == approx(slope, rel=1e-5)


def some_margins():
    """(h, p, tau): margins and labels of all kinds."""
    h = np.linspace(-9, 9, 50)
    p = np.random.default_rng(0).random(50)
    return h, p, 0.3


def test_ipo_loss_against_numpy():
    h, p, tau = some_margins()
    ours = ipo.ipo_loss(f64(h), f64(p), tau).numpy()
    target = (2 * p - 1) / (2 * tau)
    assert np.allclose(ours, (h - target) ** 2)


def test_dpo_loss_against_numpy():
    h, p, tau = some_margins()
    ours = ipo.dpo_loss(f64(h), f64(p), tau).numpy()
    chosen = np.logaddexp(0, -tau * h)
    rejected = np.logaddexp(0, tau * h)
    assert np.allclose(ours, p * chosen + (1 - p) * rejected)


@cases("loss, expected", [(ipo.ipo_loss, 11.56), (ipo.dpo_loss, 0.616344)])
def test_the_parity_fixture(loss, expected):
    """What tools are compared on: token log-ratios of one pair, tau 0.1, summed as in the paper."""
    logp = f64([0.5 + 0.25 + 0.25 + 0, -0.2 - 0.4])
    h = ipo.margin(logp, torch.zeros(2))
    value = loss(h, torch.ones(1), 0.1).item()
    assert value == approx(expected, rel=1e-5)


def test_margin_is_chosen_minus_rejected_and_needs_the_reference():
    """h = log pi(yw)/ref(yw) - log pi(yl)/ref(yl), chosen rows first."""
    logp = torch.tensor([1.0, 2, 3, 5])
    ref_logp = torch.tensor([0.5, 0, 0.25, 0])
    first = (1 - 0.5) - (3 - 0.25)
    second = 2 - 5
    assert ipo.margin(logp, ref_logp).tolist() == [first, second]


# ----------------------------------------------------------------------------------------- common misreadings

def test_the_scaled_square_is_another_loss():
    """(beta h - 1/(2 beta))^2 asks for 1/(2 beta^2) = 50 nats at 0.1, ten times eq. 17's 5."""
    h, tau = torch.linspace(0, 100, 10_001, dtype=torch.float64), 0.1
    scaled = (tau * h - 1 / (2 * tau)) ** 2
    ours = ipo.ipo_loss(h, torch.ones(1), tau)
    assert h[scaled.argmin()] == approx(50)
    assert h[ours.argmin()] == approx(5)


@cases("name, psi", [("ipo", identity), ("dpo", torch.logit)])
@cases("p", [0.3, 0.6, 0.9])
def test_population_link_of_each_loss(name, psi, p):
    """argmin_h p f(h) + (1-p) f(-h), on a grid: p - 1/2 (IPO), logit p (DPO). Psi is this map, not f."""
    h = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    loss = ipo.LOSSES[name]
    won = loss(h, torch.ones(1), 1.0)
    lost = loss(-h, torch.ones(1), 1.0)
    expected = p * won + (1 - p) * lost
    best = h[expected.argmin()].item()
    q = f64(p)
    odd_part = (psi(q) - psi(1 - q)).item() / 2
    assert best == approx(odd_part, abs=1e-3)
    assert ipo.PSI_OF[name](q) == psi(q)


UNIFORM = "0.33333333 0.33333333 0.33333333"


def policy_of(p, mu, ref, tau, psi=identity):
    """eq. 7 for one prompt, as probabilities."""
    log_ref = numbers(ref).log()[None]
    worth = psi(numbers(p))[None]
    best = data.optimum(log_ref, worth, numbers(mu)[None], tau)
    return best[0].exp()


@cases("ref, probability", [("0.9 0.1", 0.155), ("0.5 0.5", 0.622)])
def test_without_a_reference_the_answer_is_another(ref, probability):
    """y2 preferred, tau = 1: pi*(y2) = sigmoid(log(ref2/ref1) + 1/2)."""
    second_wins = "0.5 0 / 1 0.5"
    best = policy_of(second_wins, "0.5 0.5", ref, 1.0)
    assert best[1].item() == approx(probability, abs=5e-4)


def slope(loss, policy):
    """Of loss(log-probs), largest in the logits of a policy that is given by its probabilities."""
    theta = policy.log().requires_grad_()
    loss(theta.log_softmax(0)).backward()
    return theta.grad.abs().max().item()


@cases("length, power, stationary", [
    ("1 2 4", "1 2 4", True),
    ("1 2 4", "1 1 1", False),
    ("1 1 1", "1 1 1", True),
])
def test_the_mean_form_has_another_optimum(length, power, stationary):
    """With means over tokens the slope is 0 at ref exp(|y| g/tau), and not at the sum's ref exp(g/tau)."""
    p = numbers("0.5 0.9 0.2 / 0.1 0.5 0.7 / 0.8 0.3 0.5")
    mu, pi, tau = numbers("0.5 0.3 0.2"), numbers("0.2 0.5 0.3"), 0.5
    g = (p * mu).sum(-1)
    log_ref = pi.log() - numbers(power) * g / tau  # so that pi is ref exp(power g/tau)

    def loss(logp):
        f = (logp - log_ref) / numbers(length)
        h = f[:, None] - f
        weight = mu[:, None] * mu
        return (weight * ipo.ipo_loss(h, p, tau)).sum()

    assert (slope(loss, pi) < 1e-9) == stationary


@cases("length", [1, 4])
def test_a_certain_pair_stops_at_the_target_in_the_mean_form_too(length):
    """What bounds the margin of means, h / |y|, is the finite target 1/(2 tau) = 5, not the mean."""
    h = torch.linspace(0, 40, 4001, dtype=torch.float64)
    loss = ipo.ipo_loss(h / length, torch.ones(1), 0.1)
    assert h[loss.argmin()].item() == approx(5 * length)


def test_tau_pulls_to_the_reference_whatever_its_entropy():
    """Towards a peaked reference the entropy of pi* falls as tau rises: no exploration."""
    rare_ones_win = "0.5 0.1 0.1 / 0.9 0.5 0.5 / 0.9 0.5 0.5"
    entropies = []
    for tau in (0.1, 0.3, 1, 10):
        best = policy_of(rare_ones_win, UNIFORM, "0.98 0.01 0.01", tau)
        entropies.append(torch.special.entr(best).sum().item())
    assert entropies == approx([1.06, 0.31, 0.15, 0.12], abs=0.01)


def largest_slope(loss, pairs, policy):
    """Of a loss at tau 0.1, over pairs such as "ab bc" (a was chosen, b rejected; b chosen, c rejected)."""
    chosen = ["abc".index(pair[0]) for pair in pairs.split()]
    rejected = ["abc".index(pair[1]) for pair in pairs.split()]

    def mean_loss(logp):
        h = logp[chosen] - logp[rejected]
        return loss(h, torch.ones(1), 0.1).mean()

    return slope(mean_loss, numbers(policy))


@cases("pairs, best", [
    ("ab bc ac", "0.964370 0.034403 0.001227"),
    ("ab ba", UNIFORM),
    ("ab bc ca", UNIFORM),
    ("ac bc", "0.498321 0.498321 0.003358"),
])
def test_ipo_ends_at_its_optimum_on_certain_pairs(pairs, best):
    """The paper's bandits, uniform reference, tau 0.1."""
    assert largest_slope(ipo.ipo_loss, pairs, best) < 2e-3


@cases("pairs, limit", [
    ("ab bc ac", "1 1e-90 1e-180"),
    ("ab ba", UNIFORM),
    ("ab bc ca", UNIFORM),
    ("ac bc", "0.5 0.5 1e-90"),
])
def test_dpo_tends_to_a_limit_on_certain_pairs(pairs, limit):
    """The same bandits: DPO's slope is 0 where each sure preference is certain; on a cycle both stay."""
    assert largest_slope(ipo.dpo_loss, pairs, limit) < 1e-6


@cases("pairs, best", [
    ("ab bc ac", "0.964370 0.034403 0.001227"),
    ("ac bc", "0.498321 0.498321 0.003358"),
])
def test_dpo_leaves_ipos_optimum_on_certain_pairs(pairs, best):
    assert largest_slope(ipo.dpo_loss, pairs, best) > 1e-3


def distance_of_optima(psi):
    """KL from pi* for a mu that follows the reward to pi* for another mu, in the world of Bradley-Terry."""
    p = data.World("bt").pstar
    ref = random_policies()[0]
    some_mu = (8 * p.mean(-1)).softmax(-1)
    some = data.optimum(ref, psi(p), some_mu, 0.1)
    other = data.optimum(ref, psi(p), ref.exp(), 0.1)
    return data.kl(some, other).item()


def test_dpos_targets_are_at_least_four_times_as_large():
    """The README's reason for how far its optimum is."""
    p = torch.linspace(0.51, 0.99, 49).double()
    dpo = torch.logit(p) / 0.2
    assert (dpo >= 4 * ipo.target(p, 0.2)).all()


def test_mu_matters_unless_psi_is_logit_under_bradley_terry():
    """logit p* = r - r': another mu adds a constant to g, which Z takes up; the identity has no such luck."""
    assert distance_of_optima(torch.logit) < 1e-9
    assert distance_of_optima(identity) > 0.01


# --------------------------------------------------------------------------------- the log-prob of a response

def brute_force(policy, ids, mask):
    """The sum of log-probs of the tokens under the mask, each from a pass over the tokens before it."""
    total = 0.0
    for t in range(len(ids)):
        if mask[t]:
            logits = policy(ids[None, :t])[0, -1]
            total += logits.log_softmax(-1)[ids[t]].item()
    return total


def test_sequence_logp_is_the_product_of_conditionals():
    """Token by token; prompts of different lengths, padded rows."""
    policy = gpt()
    tokens = numbers("1 2 3 4 0 / 4 3 1 0 0 / 2 2 2 2 2").long()
    mask = numbers("0 0 1 1 0 / 0 1 1 0 0 / 0 1 1 1 1").bool()
    ours = ipo.sequence_logp(policy, tokens, mask)
    expected = [brute_force(policy, *row) for row in zip(tokens, mask)]
    assert ours.tolist() == approx(expected, abs=1e-5)


def test_probabilities_of_all_short_responses_sum_to_one():
    """Every string over {0..3} that ends with 4 (end of text) or is cut at three: 1 + 4 + 16 + 64."""
    responses = list(map(list, itertools.product(range(4), repeat=3)))
    for length in range(3):
        strings = itertools.product(range(4), repeat=length)
        responses += [[*string, 4] for string in strings]
    rows = data.PairData([[2, 1]] * len(responses), responses)
    logp = ipo.sequence_logp(gpt(), *rows.padded(torch.arange(85)))
    assert len(responses) == 85
    assert logp.exp().sum().item() == approx(1, abs=1e-5)


def test_the_default_run_takes_the_plain_lines():
    """A row of the world has five tokens at most."""
    world = ipo.WorldSource(options())
    tokens, _ = world.pairs.padded(torch.arange(400))
    assert not model.sharing_pays(gpt(), tokens)


def test_long_rows_take_the_fast_path():
    policy = byte_gpt()
    tokens = torch.randint(257, (4, 40))
    with mock.patch.object(model, "shared_hidden", wraps=model.shared_hidden) as fast:
        ipo.sequence_logp(policy, tokens, torch.ones(4, 40).bool())
    assert fast.call_count == 1


def test_another_model_never_takes_the_fast_path():
    """Its hidden states may be anything."""
    class Mine(model.GPT):
        pass

    policy = Mine(model.GPTConfig(64, 11, 11, 1, 2, 16))
    assert not model.sharing_pays(policy, torch.zeros(4, 40))


FORK = numbers("3 40 2 50 3 2")[:, None]  # where the scored part of each row below begins ...
STOP = numbers("60 45 57 58 20 57")[:, None]  # ... and ends


def forked_rows():
    """tokens (6,60), mask (6,60). They share prefixes of many lengths; the last row is the third again."""
    tokens = torch.randint(3, (6, 60), generator=seeded())
    tokens[3:, :40] = tokens[:3, :40]
    tokens[5] = tokens[2]
    t = torch.arange(60)
    return tokens, (t >= FORK) & (t < STOP)


def double_gpt():
    return gpt(block_size=64, vocab_size=11, head_size=11).double()


def plain_logp(policy, tokens, mask):
    """The plain pass over every position, in one piece."""
    logp = policy(tokens)[:, :-1].log_softmax(-1)
    said = tokens[:, 1:, None]
    token_logp = logp.gather(2, said)[..., 0]
    return (token_logp * mask[:, 1:]).sum(1)


def plain_hidden(policy, tokens, wanted):
    return policy.hidden(tokens)[wanted]


def test_shared_prefixes_change_no_value():
    """float64, rows that share prefixes of many lengths."""
    policy, (tokens, wanted) = double_gpt(), forked_rows()
    ours = model.shared_hidden(policy, tokens, wanted)
    plain = plain_hidden(policy, tokens, wanted)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-10)


def test_a_row_may_want_nothing():
    """Its log-prob is 0, that of an empty response, and the other rows' are as before."""
    policy, (tokens, mask) = gpt(block_size=64), forked_rows()
    before = ipo.sequence_logp(policy, tokens, mask)
    mask[2] = False
    after = ipo.sequence_logp(policy, tokens, mask)
    assert after[2] == 0
    assert torch.allclose(after[3:], before[3:], atol=1e-4)


def test_shared_prefixes_change_no_gradient():
    """float64, another weight for each number."""
    policy, (tokens, wanted) = double_gpt(), forked_rows()
    weights = torch.randn(int(wanted.sum()), 16).double()
    gradients = []
    for hidden in (model.shared_hidden, plain_hidden):
        value = (hidden(policy, tokens, wanted) * weights).sum()
        gradients.append(torch.autograd.grad(value, policy.transformer.parameters()))
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-9, atol=1e-9)


def test_long_rows_have_the_plain_log_probs():
    policy, (tokens, mask) = gpt(block_size=64), forked_rows()
    ours = ipo.sequence_logp(policy, tokens, mask)
    assert torch.allclose(ours, plain_logp(policy, tokens, mask), atol=1e-4)


def test_each_distinct_prefix_is_computed_once():
    """As many as brute force counts; no position behind the last that is scored."""
    policy, (tokens, mask) = double_gpt(), forked_rows()
    computed = []

    def count(layer, x, y):
        computed.append(len(y))

    policy.transformer.ln_f.register_forward_hook(count)
    ipo.sequence_logp(policy, tokens, mask)
    prefixes = set()
    for row, stop in zip(tokens.tolist(), STOP[:, 0].int()):
        prefixes |= {tuple(row[:n]) for n in range(1, stop)}
    assert computed == [len(prefixes)]


def test_gradients_of_shared_prefixes_do_not_stall_in_bfloat16():
    """One prefix in a thousand rows: a sum of a thousand ones, which in bfloat16 would stop at 256."""
    x = torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_()
    where = torch.zeros(1000, dtype=torch.int64)
    model.take(x, where).sum().backward()
    assert x.grad.item() == 1000


def test_a_bfloat16_prefix_stays_bfloat16():
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    assert model.take(x, torch.tensor([2, 0])).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- the policy

def hugging_face(std=0.2, **sizes):
    """A random GPT-2 of transformers with GPT-2's vocabulary."""
    import transformers
    small = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**small | sizes)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=std)
    return theirs


@cases("sizes", [
    {},
    {"n_layer": 1, "n_head": 3, "n_embd": 48, "n_positions": 20},
    {"n_layer": 3, "n_head": 1},
])
@torch.no_grad()
def test_gpt_is_gpt2(tmp_path, sizes):
    """transformers' weights in our GPT give transformers' logits."""
    theirs = hugging_face(**sizes)
    theirs.save_pretrained(tmp_path)
    ours = model.from_gpt2(str(tmp_path))
    tokens = 1000 * torch.arange(36).view(3, 12)
    expected = theirs(tokens).logits
    assert torch.allclose(ours(tokens), expected, rtol=0, atol=2e-5)


def test_the_context_of_gpt2_is_taken_over(tmp_path):
    hugging_face(n_positions=20).save_pretrained(tmp_path)
    policy, tokenizer = model.load(str(tmp_path))
    assert policy.config.block_size == 20
    assert tokenizer == "gpt2"


def not_gpt2(path):
    """The folder is refused in one line, which it returns."""
    with pytest.raises(data.Refused) as error:
        model.from_gpt2(str(path))
    line = str(error.value)
    assert line.startswith(f"--init_from {path}: ")
    assert "name a run's .pt file, a folder" in line
    assert "\n" not in line
    return line


@cases("variant", [
    {"activation_function": "relu"},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    {"vocab_size": 51_200},
    {"vocab_size": 257},
])
def test_a_variant_of_gpt2_is_refused(tmp_path, variant):
    """Another activation, scale or head; ids that are not GPT-2's."""
    hugging_face(0.5, **variant).save_pretrained(tmp_path)
    assert "not GPT-2's weights: a gpt2 of" in not_gpt2(tmp_path)


def test_another_width_is_refused(tmp_path):
    hugging_face(n_inner=40).save_pretrained(tmp_path)
    not_gpt2(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    import transformers
    transformers.LlamaConfig().save_pretrained(tmp_path)
    not_gpt2(tmp_path)


def test_gpt2_without_some_of_its_weights_is_refused(tmp_path):
    theirs = hugging_face()
    state = theirs.state_dict()
    lacking = {name: p for name, p in state.items() if ".h.1." not in name}
    theirs.save_pretrained(tmp_path, state_dict=lacking)
    not_gpt2(tmp_path)


def test_a_cut_file_of_gpt2_is_refused(tmp_path):
    hugging_face().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 500)
    not_gpt2(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    not_gpt2(tmp_path)


def initial_weights():
    torch.manual_seed(0)
    sizes = model.GPTConfig(64, 300, 300, n_layer=8, n_head=4, n_embd=64)
    return dict(model.GPT(sizes).named_parameters())


def test_initial_matrices_are_gpt2s():
    """Normal, std .02; what blocks add to the stream, 2 per block, by sqrt(2 n_layer) = 4 less."""
    for name, p in initial_weights().items():
        std = 0.005 if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert p.std().item() == approx(std, rel=0.06), name
            assert abs(p.mean().item()) < std / 20, name


def test_initial_vectors_are_gpt2s():
    """Scales 1, everything that is added 0."""
    for name, p in initial_weights().items():
        if p.dim() == 1:
            assert (p == name.endswith("weight")).all(), name


def test_a_position_never_sees_what_follows():
    policy = gpt()
    tokens = numbers("1 2 3 4 0 / 1 2 3 0 2").long()
    one, other = policy(tokens)[:, :3]
    assert torch.equal(one, other)


def test_too_many_tokens_are_an_error():
    with pytest.raises(ValueError, match="7 tokens exceed the context of 6"):
        gpt().hidden(torch.zeros(1, 7).long())


# ------------------------------------------------------------------------------------------------ its answers

ABCD = data.Words(["a", "b", "c", "d"])  # ids 0 to 3; 4 is end of text


def speaker():
    """A GPT that says a, b, c, d or end of text, and reads the prompt's words, too."""
    return gpt(3, vocab_size=ABCD.n_vocab)


SPEAKER = speaker()


def answer(seed=0, temperature=1.0, text="b c", most=1):
    return model.generate(SPEAKER, ABCD, text, temperature, seed, most)


@cases("temperature", [1.0, 2.0])
def test_generate_samples_the_model(temperature):
    """Frequencies of one-token samples against the softmax."""
    prompt = torch.tensor([[1, 2]])
    logits = SPEAKER(prompt)[0, -1].detach()
    expected = (logits / temperature).softmax(-1)
    said = [answer(seed, temperature) for seed in range(1000)]
    words = " a", " b", " c", " d", ""  # "": the end
    share = [said.count(word) / 1000 for word in words]
    assert share == approx(expected.tolist(), abs=0.05)


@cases("cold", [0, 1e-300])
def test_temperature_0_or_almost_is_the_likeliest(cold):
    said = [answer(seed) for seed in range(200)]
    likeliest = max(said, key=said.count)
    assert answer(0, cold) == likeliest


def test_an_answer_is_the_same_for_the_same_seed():
    assert answer(5, most=4) == answer(5, most=4)


def longest_answer(most):
    """The words of the longest of 50 answers."""
    said = [answer(seed, most=most) for seed in range(50)]
    return max(len(text.split()) for text in said)


def test_an_answer_ends_where_the_context_does():
    """Six tokens, of which the prompt takes two."""
    assert longest_answer(64) == 4


def test_an_answer_ends_at_max_new_tokens():
    assert longest_answer(2) == 2


def test_an_answer_is_what_follows_the_prompt():
    assert not answer(0, 0, most=4).startswith("b c")


def test_an_empty_prompt_is_end_of_text():
    """As GPT-2 was trained: the answer is that to end of text."""
    of_nothing = answer(0, 0, "", 3)
    assert of_nothing == answer(0, 0, data.EOT, 3)


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(data.Refused, match="a prompt of 6 tokens fills the context of 6; write"):
        answer(text="a b c d a b")


def test_a_policy_that_is_not_finite_says_so():
    policy = speaker()
    policy.transformer.ln_f.weight.data.fill_(math.nan)
    with pytest.raises(data.Refused, match="weights are not finite: its run diverged"):
        model.generate(policy, ABCD, "a")


def test_ids_that_the_tokenizer_lacks_are_never_said():
    """A model may have more ids than its tokenizer, for speed."""
    policy = gpt(3, vocab_size=300, head_size=300, block_size=40)
    tokenizer = data.get_tokenizer("bytes")
    text = model.generate(policy, tokenizer, "a", 3.0)
    assert isinstance(text, str)


# ------------------------------------------------------------------------------------------- files of weights

def saved(path, **more):
    """A file of gpt(); returns its bytes."""
    model.save(path, gpt(), Namespace(tokenizer="bytes"), **more)
    return Path(path).read_bytes()


def test_a_file_returns_what_was_saved(tmp_path):
    path = str(tmp_path / "a.pt")
    saved(path, step=7)
    policy, tokenizer = model.load(path)
    assert same_weights(policy, gpt())
    assert policy.config == gpt().config
    assert tokenizer == "bytes"
    assert model.read(path)["step"] == 7
    assert model.read(path)["flags"] == {"tokenizer": "bytes"}


def flipped(whole, place, bit):
    """These bytes, with one bit flipped."""
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def test_a_flipped_bit_is_refused(tmp_path):
    """Each of 300, wherever it is."""
    path, rng = tmp_path / "a.pt", np.random.default_rng(0)
    whole = saved(path)
    for place in rng.integers(len(whole), size=300):
        path.write_bytes(flipped(whole, place, rng.integers(8)))
        with pytest.raises(data.Refused) as error:
            model.load(str(path))
        assert re.fullmatch(f"{path}: not what a run saved .*; name the ckpt.pt or .*", str(error.value))


def test_a_file_is_one_that_torch_loads(tmp_path):
    saved(tmp_path / "a.pt", step=7)
    assert torch.load(tmp_path / "a.pt")["step"] == 7


def test_nothing_else_is_left_beside_a_file(tmp_path):
    saved(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_executes_nothing(tmp_path, monkeypatch):
    """Even one that is sealed as ours are."""
    monkeypatch.chdir(tmp_path)
    saved("a.pt", evil=Evil())
    with pytest.raises(data.Refused, match="^a.pt: not what a run saved"):
        model.load("a.pt")
    assert not Path("evil").exists()


FOREIGN = {
    "cut": lambda whole: whole[:3000],
    "a byte less": lambda whole: whole[:-1],
    "empty": lambda whole: b"",
    "text": lambda whole: b"text",
}


@cases("kind", FOREIGN)
def test_bytes_that_no_run_wrote_are_refused(tmp_path, kind):
    path = tmp_path / "a.pt"
    path.write_bytes(FOREIGN[kind](saved(path)))
    with pytest.raises(data.Refused, match="a.pt: not what a run saved"):
        model.load(str(path))


def test_a_file_of_tensors_that_no_run_wrote_is_refused(tmp_path):
    torch.save(gpt().state_dict(), tmp_path / "a.pt")
    with pytest.raises(data.Refused, match="not written by this program"):
        model.load(str(tmp_path / "a.pt"))


def test_a_file_that_was_changed_and_saved_again_is_refused(tmp_path):
    """torch.load, another step, torch.save."""
    path = tmp_path / "a.pt"
    saved(path, step=1)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"step": 2}, path)
    with pytest.raises(data.Refused, match="not what a run saved"):
        model.read(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(data.Refused, match="No such file"):
        model.load(str(tmp_path / "no.pt"))


@cases("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device\n")])
def test_a_full_disk_leaves_the_old_file(tmp_path, error):
    """One line names the file; what was saved before is whole."""
    path = tmp_path / "a.pt"
    whole = saved(path)
    with mock.patch.object(torch, "save", side_effect=error):
        with pytest.raises(data.Refused, match="cannot be written .*No space left on device"):
            saved(path)
    assert path.read_bytes() == whole


def on_a_machine_that_is_gone(storage, location):
    if location == "gone:0":
        raise RuntimeError("no such device here")


def test_a_file_is_read_without_the_device_that_wrote_it(tmp_path, monkeypatch):
    """As a GPU's file on a machine without one."""
    registry = list(torch.serialization._package_registry)
    monkeypatch.setattr(torch.serialization, "_package_registry", registry)
    torch.serialization.register_package(0, lambda storage: "gone:0", on_a_machine_that_is_gone)
    path = tmp_path / "a.pt"
    saved(path)
    with pytest.raises(RuntimeError, match="no such device here"):
        torch.load(path)
    assert same_weights(model.load(str(path))[0], gpt())


# ------------------------------------------------------------------------------------------------- the worlds

def random_policies():
    """Three unrelated policies in a world of 4 prompts, as log-probs (4,400)."""
    logits = torch.randn(3, 4, 400, generator=seeded())
    return list(logits.double().log_softmax(-1))


def reward(text, x):
    """The sum of the words' values for the subject of prompt x."""
    return sum(data.VALUES[word][x] for word in text.split())


def preferred(name, x, a, b):
    """p*(a>b) for prompt x, from the words of two reviews."""
    gap = reward(a, x) - reward(b, x)
    if name == "deterministic":
        return 0.5 if abs(gap) < 1e-9 else float(gap > 0)
    if name == "cyclic" and a and b:
        first = data.WORDS.index(a.split()[0])
        second = data.WORDS.index(b.split()[0])
        gap += (0, 2, -2)[(first - second) % 3]
    return 1 / (1 + math.exp(-gap))


@cases("name", data.WORLDS)
def test_preferences_are_what_they_say(name):
    """p* word by word, for 500 pairs of reviews."""
    world, rng = data.World(name), np.random.default_rng(0)
    numbered = rng.integers([4, 400, 400], size=(500, 3))
    for x, a, b in numbered:
        expected = preferred(name, x, world.responses[a], world.responses[b])
        assert world.pstar[x, a, b].item() == approx(expected, abs=1e-9)


@cases("text", ["", "hot", "good cold", "hot awful hot"])
def test_a_reward_is_the_sum_of_its_words(text):
    world = data.World("bt")
    rewards = world.reward[:, world.responses.index(text)]
    assert rewards.tolist() == approx([reward(text, x) for x in range(4)])


@cases("name", data.WORLDS)
def test_a_preference_and_its_mirror_sum_to_one(name):
    p = data.World(name).pstar
    assert torch.allclose(p + p.transpose(1, 2), torch.ones_like(p))


def has_a_cycle(name):
    """Three one-word reviews of which each is preferred to the next."""
    p = data.World(name).pstar[0]
    for a, b, c in itertools.permutations(range(1, 8), 3):
        steps = p[a, b], p[b, c], p[c, a]
        if min(steps) > 0.5:
            return True
    return False


@cases("name", data.WORLDS)
def test_cyclic_alone_is_intransitive(name):
    assert has_a_cycle(name) == (name == "cyclic")


def test_every_review_of_three_words_is_there_once():
    responses = data.World("bt").responses
    assert len(responses) == 1 + 7 + 49 + 343
    assert len(set(responses)) == 400


def test_a_world_of_other_words_and_lengths():
    world = data.World("bt", ["good", "dull"], (0, 1))
    assert world.responses == ["", "good", "dull"]
    good_to_dull = world.pstar[0, 1, 2].item()
    assert good_to_dull == approx(1 / (1 + math.exp(-1)))


def test_the_base_distribution_ends_a_text_with_probability_one_quarter():
    """After the first and after the second word; never before the first."""
    world = data.World("bt")
    length = torch.tensor([len(text.split()) for text in world.responses])
    share = torch.bincount(length, world.base)
    assert share.tolist() == approx([0, 1 / 4, 3 / 16, 9 / 16])


def test_sft_shows_each_prompt_the_base_distribution():
    weight = ipo.WorldSource(options()).sft_weight.view(4, 400)
    assert torch.equal(weight, data.World("bt").base.expand(4, 400))


def world_gpt(world, seed=0):
    """A GPT with the sizes of a world's model."""
    block_size, vocab_size, head_size = world.sizes
    return gpt(seed, block_size=block_size, vocab_size=vocab_size, head_size=head_size)


def test_any_model_of_the_world_gives_its_responses_probability_one():
    world = ipo.WorldSource(options())
    probs = world.table(world_gpt(world)).exp()
    assert probs.sum(-1).tolist() == approx([1] * 4, abs=1e-5)


def test_a_model_of_the_world_says_nothing_else():
    world = data.World("bt")
    policy = world_gpt(world)
    for seed in range(50):
        text = model.generate(policy, world.tokenizer, "coffee review:", seed=seed)
        assert text.strip() in world.responses


def test_the_world_refuses_other_words():
    with pytest.raises(data.Refused, match="the world has no word 'sushi'; it has superb, good"):
        data.World("bt").tokenizer.encode_ordinary("sushi review:")


def drawn(labels, n=200_001, seed=0, name="bt"):
    """(world, mu, prompt, first, second): pairs from a random mu."""
    world = data.World(name)
    mu = random_policies()[2].exp()
    world.draw(n, mu, labels, seeded(seed))
    x = world.pairs.prompt
    first = world.pairs.chosen - 400 * x
    second = world.pairs.rejected - 400 * x
    return world, mu, x, first, second


def test_prompts_have_as_many_pairs_each():
    """The last one less, if their number is no multiple of four."""
    prompts = drawn("hard", 10)[2]
    assert prompts.bincount().tolist() == [3, 3, 3, 1]


@cases("labels", ["hard", "soft"])
def test_responses_come_from_mu(labels):
    """The shares of prompt 2's responses, to .002."""
    _, mu, x, first, second = drawn(labels)
    both = torch.cat([first[x == 2], second[x == 2]])
    share = torch.bincount(both, minlength=400) / len(both)
    assert (share - mu[2]).abs().max() < 2e-3


def test_the_two_responses_are_independent():
    """Equal as often as chance says: no pair is drawn again."""
    _, mu, x, first, second = drawn("soft")
    expected = (mu ** 2).sum(-1).mean().item()
    share = (first == second).double().mean().item()
    assert share == approx(expected, rel=0.1)


def test_a_hard_label_is_a_coin_flip_with_p_star():
    """How often the response of lower number wins, against the mean of p* for it."""
    world, _, x, first, second = drawn("hard")
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    differ = low < high
    expected = world.pstar[x, low, high][differ].mean().item()
    share = (first < second)[differ].double().mean().item()
    assert share == approx(expected, abs=5e-3)


def test_hard_labels_are_certain():
    assert (drawn("hard")[0].pairs.p == 1).all()


def test_soft_labels_are_p_star():
    world, _, x, first, second = drawn("soft")
    expected = world.pstar[x, first, second].float()
    assert torch.equal(world.pairs.p, expected)


def test_a_sure_preference_always_wins():
    world, _, x, first, second = drawn("hard", name="deterministic")
    assert world.pstar[x, first, second].min() >= 0.5


def test_a_reference_that_always_says_the_same_gives_pairs_without_gradient():
    """Both responses are the same, which is no error."""
    world = data.World("bt")
    mu = torch.zeros(4, 400).double()
    mu[:, 7] = 1
    world.draw(10, mu, "hard", seeded())
    assert torch.equal(world.pairs.chosen, world.pairs.rejected)


# ------------------------------------------------------------------------------------------- exact quantities

def objective(logp, ref, p, mu, psi, tau):
    """J of eq. 6: the mean worth of winning against mu, less tau KL(pi||ref)."""
    pi = logp.exp()
    worth = pi[:, :, None] * psi(p) * mu[:, None, :]
    mean = worth.sum((1, 2)).mean()
    return mean - tau * data.kl(logp, ref)


@cases("name", ["bt", "cyclic"])
@cases("psi", [identity, steep, torch.logit, torch.square, torch.sqrt])
def test_the_gap_to_the_optimum_is_tau_times_the_kl(name, psi):
    """J(pi*) - J(pi) = tau KL(pi||pi*) for every pi and Psi: so eq. 7 is the maximum, and the only one."""
    p, tau = data.World(name).pstar, 0.3
    pi, ref, log_mu = random_policies()
    mu = log_mu.exp()
    best = data.optimum(ref, psi(p), mu, tau)
    top = objective(best, ref, p, mu, psi, tau)
    below = objective(pi, ref, p, mu, psi, tau)
    distance = data.kl(pi, best).item()
    assert distance > 0.1
    assert (top - below).item() == approx(tau * distance, rel=1e-9)


def test_kl_against_loops():
    """Plain sums, one prompt at a time, then their mean."""
    pi, other, _ = random_policies()
    total = 0.0
    for x in range(4):
        for y in range(400):
            difference = pi[x, y] - other[x, y]
            total += math.exp(pi[x, y]) * difference.item()
    assert data.kl(pi, other).item() == approx(total / 4)


def test_mean_over_opponents_against_numpy():
    p, mu = data.World("cyclic").pstar, random_policies()[2].exp()
    ours = data.mean_over_opponents(p, mu)
    for x in range(4):
        expected = p[x].numpy() @ mu[x].numpy()
        assert np.allclose(ours[x], expected)


def log_odds(q):
    return math.log(q / (1 - q))


SURE = ("0.5 0.7 1 0.6 / 0.3 0.5 1 0.6 / 0 0 0.5 1 / 0.4 0.4 0 0.5",  # p*
        "0.3 0.2 0.1 0.4",                                            # mu
        "0.1 0.2 0.3 0.4")                                            # ref


def test_infinite_worth_is_the_limit_of_large_worth():
    """Logit of preferences that are sure but for e: as e falls, eq. 7 tends to the answer for e = 0."""
    near = policy_of(*SURE, 0.5, lambda q: torch.logit(q).clamp(-1000, 1000))
    limit = policy_of(*SURE, 0.5, torch.logit)
    assert torch.allclose(limit, near, atol=1e-9)


def test_in_the_limit_the_most_sure_wins_take_everything():
    """Sure wins less sure losses: .1, .1, -.1, -.1. The first two share as their other worth says."""
    first = 0.1 * math.exp(0.2 * log_odds(0.7) / 0.5)
    second = 0.2 * math.exp(0.3 * log_odds(0.3) / 0.5)
    share = first / (first + second)
    limit = policy_of(*SURE, 0.5, torch.logit)
    assert limit.tolist() == approx([share, 1 - share, 0, 0])

SMALL_WORLD = ["superb", "dull", "hot"], (0, 1/4, 3/4)  # its words, and how many texts of SFT have 0, 1, 2


@pytest.fixture
def small_world(monkeypatch):
    """Worlds have 4 prompts and 13 responses."""
    monkeypatch.setattr(data.World.__init__, "__defaults__", SMALL_WORLD)


def posed(*argv):
    """(source, policy): a world that was given a random policy as its reference."""
    source = ipo.WorldSource(options("--pairs", 64, "--tau", 0.5, *argv))
    policy = world_gpt(source)
    source.set_reference(ipo.score(policy, source.pairs, source.args))
    return source, policy


def endless_labels(source, labels):
    """loss(log-probs of prompt 2): its mean over all pairs from mu and all labels of this kind."""
    ref = source.exact["ref"][2]
    mu, p = source.mu[2], source.pstar[2]
    weight = mu[:, None] * mu

    def loss(logp):
        f = logp - ref
        h = f[:, None] - f
        if labels == "soft":
            return (weight * ipo.ipo_loss(h, p, 0.5)).sum()
        won = ipo.ipo_loss(h, f64(1), 0.5)
        lost = ipo.ipo_loss(-h, f64(1), 0.5)
        return (weight * (p * won + (1 - p) * lost)).sum()

    return loss


@cases("labels, psi, mu, reached", [
    ("hard", identity, "uniform", True),
    ("hard", identity, "ref", True),
    ("soft", identity, "uniform", True),
    ("soft", identity, "ref", True),
    ("soft", steep, "uniform", True),
    ("soft", steep, "ref", True),
    ("hard", steep, "uniform", False),
    ("hard", torch.square, "uniform", False),
    ("soft", torch.square, "uniform", False),
    ("soft", torch.sqrt, "ref", False),
])
def test_where_endless_labels_lead(small_world, labels, psi, mu, reached):
    """The expected loss has slope 0 at pi* if the labels can say what Psi asks for, and else elsewhere."""
    ipo.psi = psi
    source, _ = posed("--labels", labels, "--mu", mu)
    best = source.exact["opt"][2].exp()
    assert (slope(endless_labels(source, labels), best) < 1e-6) == reached


def test_mu_is_uniform_by_default(small_world):
    source, _ = posed()
    assert source.mu.flatten().tolist() == approx([1 / 13] * 52)


def test_mu_may_be_the_reference(small_world):
    source, policy = posed("--mu", "ref")
    expected = source.table(policy).exp()
    assert torch.equal(source.mu, expected)


@cases("mu", ["uniform", "ref"])
def test_the_optimum_of_a_run_is_that_of_its_mu(small_world, mu):
    source, policy = posed("--mu", mu)
    ref = source.table(policy)
    best = data.optimum(ref, source.pstar, source.mu, 0.5)
    assert torch.equal(source.exact["opt"], best)


def test_the_pairs_of_a_run_come_from_its_mu_and_seed(small_world):
    source, _ = posed("--mu", "ref", "--seed", 3)
    kept = source.pairs.chosen
    source.draw(64, source.mu, "hard", seeded(32))
    assert torch.equal(kept, source.pairs.chosen)


def test_a_soft_run_has_soft_pairs(small_world):
    source, _ = posed("--labels", "soft")
    assert len(source.pairs.p.unique()) > 10


# ------------------------------------------------------------------------------------- reading your own pairs

def read(folder, *lines):
    """(pairs, path) of a file with these lines."""
    path = write(folder / "p.jsonl", *lines)
    return data.read_jsonl(path), path


def test_jsonl_is_read_as_written(tmp_path):
    """With and without p; Unicode of all kinds; whole numbers as p."""
    odd = pair("é 🙂 \u05d0 \x00", p=0.25)
    pairs, _ = read(tmp_path, pair(), odd, pair(p=1))
    plain = data.Pair(**pair())
    assert pairs == [plain, data.Pair(**odd), plain]


def test_a_byte_order_mark_is_no_text(tmp_path):
    pairs, _ = read(tmp_path, "\ufeff" + json.dumps(pair()), pair())
    assert pairs == [data.Pair(**pair())] * 2


def test_an_empty_response_is_read(tmp_path):
    """Its end of text is scored."""
    pairs, _ = read(tmp_path, pair("", "b"))
    assert pairs[0].chosen == ""


def test_blank_lines_are_counted(tmp_path, capsys):
    _, path = read(tmp_path, pair(), "", " ", pair())
    assert capsys.readouterr().out == f"{path}: 2 blank lines skipped\n"


def test_keys_that_are_not_used_are_counted(tmp_path, capsys):
    rows = [pair(score=1, source="x"), pair(score=2), pair(score=3)]
    _, path = read(tmp_path, *rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{path}: 1 lines with keys that are not used: 'score, source'",
                     f"{path}: 2 lines with keys that are not used: 'score'"]


def test_a_file_without_oddities_says_nothing(tmp_path, capsys):
    read(tmp_path, pair(p=0.3), pair())
    assert capsys.readouterr().out == ""


def test_another_parser_of_lines_may_be_given(tmp_path):
    path = write(tmp_path / "p.jsonl", {"q": "1 + 1 =", "good": "2", "bad": "3"})
    pairs = data.read_jsonl(path, lambda item, notes: data.Pair(*item.values()))
    assert pairs == [data.Pair("1 + 1 =", "2", "3")]


NOT_PAIRS = r"""
{                                        -> no JSON in UTF-8
9999...                                  -> no JSON in UTF-8
[[[[...                                  -> no JSON in UTF-8
{"prompt": "q", "p": 9999...             -> no JSON in UTF-8
{"prompt": "\ud83d", "chosen": "a"}      -> no JSON in UTF-8
{"prompt": "LATIN 1", "chosen": "a"}     -> no JSON in UTF-8
[1]                                      -> [1] is no object
null                                     -> null is no object
3                                        -> 3 is no object
{"a": 1}                                 -> 'prompt' is not among its keys (a)
{}                                       -> 'prompt' is not among its keys ()
{"question": "q", "chosen": "a"}         -> 'prompt' is not among its keys (question, chosen)
{"chosen": "a", "rejected": "b"}         -> python -m lab.models.jsonl makes JSONL of it, with --prompt KEY if
{"prompt": "q", "rejected": "a"}         -> 'chosen' is not among its keys
{"prompt": "q", "chosen": "a"}           -> 'rejected' is not among its keys
{"prompt": "q", "prompt": "q"}           -> a key stands there twice among 'prompt, prompt'; keep one
{"prompt": "", "chosen": 3, "rejected": "b"}                  -> 'chosen' is 3, not a text; write a text
{"prompt": "", "chosen": "a", "rejected": [{"role": "user"}]} -> 'rejected' is [{"role": "user"}], not a text
{"prompt": [], "chosen": "a", "rejected": "b"}                -> lists of messages run with python -m lab.
{"prompt": null, "chosen": "a", "rejected": "b"}              -> 'prompt' is null, not a text
{"prompt": "", "chosen": "a", "rejected": "b", "p": 1.5}      -> 'p' is 1.5; write the probability
{"prompt": "", "chosen": "a", "rejected": "b", "p": -0.1}     -> 'p' is -0.1; write the probability
{"prompt": "", "chosen": "a", "rejected": "b", "p": "1"}      -> 'p' is "1"; write the probability
{"prompt": "", "chosen": "a", "rejected": "b", "p": true}     -> 'p' is true; write the probability
{"prompt": "", "chosen": "a", "rejected": "b", "p": NaN}      -> 'p' is NaN; write the probability
{"prompt": "", "chosen": "a", "rejected": "b", "p": null}     -> 'p' is null; write the probability
"""


@cases("row", NOT_PAIRS.strip().splitlines())
def test_a_bad_line_is_named(tmp_path, row):
    """File, line, what was found, a remedy. (... stands for 100,000 more of the first character.)"""
    line, message = row.split(" -> ")
    line = line.strip().replace("9999...", "9" * 100_000).replace("[[[[...", "[" * 100_000)
    line = line.replace("LATIN 1", "\udce9")  # a byte that is not UTF-8
    with pytest.raises(data.Refused) as error:
        read(tmp_path, pair(), line)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/p.jsonl:2: ")
    assert message in said
    assert len(said) < 400
    assert said.endswith("(lines with faults: 1)")


def test_the_first_bad_line_is_named_and_all_are_counted(tmp_path):
    with pytest.raises(data.Refused, match=r"p.jsonl:2: 'p' is 7; .* \(lines with faults: 3\)$"):
        bad = [pair(p=7), pair(p=8), "{"]
        read(tmp_path, pair(), *bad, pair())


def test_a_half_letter_hides_nowhere(tmp_path):
    """Half a surrogate pair in a value that is not used."""
    with pytest.raises(data.Refused, match="no JSON in UTF-8"):
        read(tmp_path, pair(note="\ud83d"))


def test_a_key_twice_in_an_inner_object_is_refused(tmp_path):
    with pytest.raises(data.Refused, match="a key stands there twice among 'b, b'"):
        read(tmp_path, '{"prompt": "", "chosen": "a", "rejected": "b", "more": {"b": 1, "b": 2}}')


FIRST_LINES = [
    (b"\x1f\x8b\x08\x00", "gzip"),
    (b"PK\x03\x04{", "a zip archive"),
    (b"PAR1{", "Parquet"),
    (b"ARROW1\x00\x00", "Arrow"),
    (b"\xff\xff\xff\xff{", "Arrow"),
    (b"\xff\xfe{\x00", "UTF-16"),
    (b"\xfe\xff\x00{", "UTF-16"),
    (b'[{"prompt": "q"}]', "a JSON array"),
    (b"{\n", "JSON over several lines"),
    (b"prompt,chosen,rejected\n", "a first line without an object (of a CSV or TSV table, perhaps)"),
]


@cases("start, found", FIRST_LINES)
def test_another_format_is_named_by_its_first_bytes(tmp_path, start, found):
    """And the command that makes JSONL of it."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(start + b"\n")
    with pytest.raises(data.Refused) as error:
        data.read_jsonl(str(path))
    expected = f"--data {path}: {found}, not JSONL; python -m lab.models.jsonl makes JSONL of it"
    assert str(error.value) == expected


@cases("lines", [[], ["", " "]])
def test_an_empty_file_is_called_empty(tmp_path, lines):
    with pytest.raises(data.Refused, match="p.jsonl: the file is empty; write {"):
        read(tmp_path, *lines)


def test_a_folder_is_called_a_folder(tmp_path):
    with pytest.raises(data.Refused, match=f"--data {tmp_path}: a folder; give a JSONL file"):
        data.read_jsonl(str(tmp_path))


@cases("make", [lambda path: None, os.mkfifo])
def test_what_is_no_file_is_called_so(tmp_path, make):
    """Nothing there, or a pipe, for which nobody waits."""
    path = tmp_path / "p.jsonl"
    make(path)
    with pytest.raises(data.Refused, match=f"--data {path}: no such file; give a JSONL file"):
        data.read_jsonl(str(path))


def test_a_disk_that_fails_is_one_line(tmp_path, monkeypatch):
    path = some_pairs(tmp_path)
    broken = mock.mock_open()
    broken.return_value.__iter__.side_effect = OSError(5, "Input/output error")
    monkeypatch.setattr(data, "open", broken, raising=False)
    refused("Input/output error", "--data", path, "--tokenizer", "bytes", "--out", tmp_path)


RED = "\x1b[31m"  # a terminal's escape code
HOSTILE_LINES = [
    json.dumps({RED + "\n": 1}),
    json.dumps(pair(p=RED + "\n\r")),
    json.dumps(pair()).replace("p", RED),
    '{"a' + "\u2028" + '": 1, "a' + "\u2028" + '": 2}',
]


@cases("line", HOSTILE_LINES)
def test_a_hostile_line_reaches_the_screen_as_printable_text(tmp_path, line):
    with pytest.raises(data.Refused) as error:
        read(tmp_path, pair(), line)
    assert str(error.value).isprintable()


def test_a_hostile_key_that_is_not_used_is_printed_escaped(tmp_path, capsys):
    read(tmp_path, pair() | {RED + "\nx": 1})
    assert capsys.readouterr().out.rstrip("\n").isprintable()


def test_a_hostile_path_is_printed_escaped(tmp_path, capsys):
    folder = tmp_path / (RED + "\n")
    folder.mkdir()
    read(folder, pair(), "")
    assert capsys.readouterr().out.rstrip("\n").isprintable()


def test_a_hostile_path_is_refused_escaped(tmp_path):
    with pytest.raises(data.Refused) as error:
        data.read_jsonl(f"{tmp_path}/{RED}\n")
    assert str(error.value).isprintable()


def test_a_long_path_is_cut_and_the_remedy_stays():
    with pytest.raises(data.Refused) as error:
        data.read_jsonl("begin" + "z" * 5000)
    message = str(error.value)
    assert message.count("z") < 200
    assert message.startswith("--data begin")
    assert message.endswith(data.CONVERT)


LONG = "z" * 1000
LONG_LINES = [
    {LONG: 1},
    {f"{i}": i for i in range(3000)},
    pair(p=LONG),
    pair(chosen=[LONG]),
    json.dumps(LONG),
    LONG + "{",
    '{"%s": 1, "%s": 2}' % (LONG, LONG),
]


@cases("number", range(len(LONG_LINES)))
def test_at_most_80_characters_of_a_line_are_shown(tmp_path, number):
    with pytest.raises(data.Refused) as error:
        read(tmp_path, pair(), LONG_LINES[number])
    said = str(error.value).removeprefix(f"{tmp_path}/p.jsonl:2: ")
    assert len(said) < 80 + 250
    assert "z" * 81 not in said


def test_at_most_80_characters_of_unused_keys_are_shown(tmp_path, capsys):
    _, path = read(tmp_path, pair() | {LONG: 1})
    expected = f"{path}: 1 lines with keys that are not used: '{'z' * 80}'\n"
    assert capsys.readouterr().out == expected


# -------------------------------------------------------------------------------------------- pairs as tokens

def test_bytes_are_a_tokenizer_without_a_network():
    tokenizer = data.get_tokenizer("bytes")
    ids = tokenizer.encode_ordinary("é\n")
    assert ids == [0xc3, 0xa9, 10]
    assert tokenizer.decode(ids) == "é\n"
    assert tokenizer.eot_token == 256


def test_the_tokenizer_of_a_world_has_the_words_first():
    tokenizer = data.get_tokenizer("words")
    assert tokenizer.decode([0, 6]) == "superb cold"
    assert tokenizer.eot_token == 7


def test_a_tokenizer_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: 1 / 0)
    with pytest.raises(data.Refused, match="--tokenizer gpt2: .*use --tokenizer bytes"):
        data.get_tokenizer("gpt2")


def shown(batch):
    """The rows of a batch as (prompt, response), without padding."""
    decode, rows = data.get_tokenizer("bytes").decode, []
    for tokens, mask in zip(batch.tokens, batch.mask):
        first = int(mask.int().argmax())
        prompt = decode(tokens[:first].tolist())
        rows.append((prompt, decode(tokens[mask].tolist())))
    return rows


def batch_of(pairs):
    pairs.ref_logp = torch.arange(len(pairs.length))
    return pairs.batch(torch.arange(len(pairs.p)))


def test_a_response_ends_with_end_of_text_which_is_scored():
    batch = batch_of(encoded(pair("ab", "c", "xyz")))
    assert shown(batch) == [("xyz", "ab<|endoftext|>"), ("xyz", "c<|endoftext|>")]
    assert batch.mask.sum(1).tolist() == [3, 2]


def test_chosen_rows_come_first():
    batch = batch_of(encoded(pair("a", "b", "1"), pair("c", "d", "2")))
    texts = [prompt + response[0] for prompt, response in shown(batch)]
    assert texts == ["1a", "2c", "1b", "2d"]


def test_a_batch_has_the_p_and_the_reference_of_its_rows():
    pairs = encoded(pair("a", "b", p=0.25), pair("c", "d", p=0.5))
    pairs.ref_logp = torch.tensor([10, 20, 30, 40])
    batch = pairs.batch(torch.tensor([1, 0]))
    assert batch.p.tolist() == [0.5, 0.25]
    assert batch.ref_logp.tolist() == [30, 10, 40, 20]


def test_the_name_of_end_of_text_in_a_text_is_no_end():
    """It is encoded as the 13 characters that it is."""
    batch = batch_of(encoded(pair("<|endoftext|>", "b")))
    assert batch.mask[0].sum() == 14


def test_an_empty_prompt_is_end_of_text_before_the_response():
    batch = batch_of(encoded(pair("a", "b", "")))
    assert batch.tokens[0].tolist() == [256, ord("a"), 256]
    assert batch.mask[0].tolist() == [False, True, True]


def test_an_empty_response_scores_its_end_of_text():
    batch = batch_of(encoded(pair("", "b", "q")))
    assert batch.mask.sum(1).tolist() == [1, 2]


def test_padding_is_no_token_of_the_response():
    batch = batch_of(encoded(pair("a", "b" * 9, "q")))
    assert batch.mask[0].tolist() == [False, True, True] + [False] * 8


def test_rows_of_a_batch_are_no_longer_than_its_longest():
    pairs = encoded(pair("a", "b", "q"), pair("a" * 20, "b", "q"))
    tokens, _ = pairs.padded(torch.tensor([0, 1]))
    assert tokens.shape == (2, 3)


DIGITS = "0123456789" * 4


def test_a_long_prompt_is_cut_from_the_left(capsys):
    """Alike for both responses; of the 32 tokens the longer response and its end take four."""
    batch = batch_of(encoded(pair("yes", "no", DIGITS)))
    prompts = [prompt for prompt, _ in shown(batch)]
    assert prompts == [DIGITS[-28:]] * 2
    assert "data, of 1 pairs: 1 prompts cut from the left to fit 32 tokens" in capsys.readouterr().out


def test_a_response_is_never_cut(capsys):
    """30 bytes, end of text and one token of the prompt fit into 32."""
    kept = encoded(pair("x" * 30), pair("x" * 31))
    assert len(kept.p) == 1
    assert batch_of(kept).mask[0].sum() == 31
    said = capsys.readouterr().out
    assert "1 pairs dropped: a response leaves no room for a prompt in 32 tokens" in said


def test_a_prompt_that_just_fits_is_not_cut(capsys):
    encoded(pair("yes", "no", "z" * 28))
    assert capsys.readouterr().out == ""


def test_pairs_of_equals_are_dropped_and_counted(capsys):
    kept = encoded(pair("same", "same"), pair())
    assert len(kept.p) == 1
    said = capsys.readouterr().out
    assert said == "data, of 2 pairs: 1 pairs dropped: chosen and rejected are the same tokens\n"


def test_if_every_pair_is_dropped_the_data_are_refused():
    with pytest.raises(data.Refused, match="every pair was dropped, as counted above; mend"):
        encoded(pair("same", "same"))


ODDITIES = [
    ([pair(prompt="")], "1 empty prompts: the response follows <|endoftext|>"),
    ([pair("")], "1 pairs with an empty or blank response"),
    ([pair(rejected=" \n")], "1 pairs with an empty or blank response"),
    ([pair("a\n\nHuman: b")], "1 pairs with another turn or a role in a response"),
    ([pair(rejected="[INST] b")], "1 pairs with another turn or a role in a response"),
    ([pair("a<|im_start|>")], "1 pairs with another turn or a role in a response"),
    ([pair("q: good")], "1 pairs with a response that repeats its prompt"),
    ([pair(rejected="q: bad")], "1 pairs with a response that repeats its prompt"),
    ([pair(), pair()], "1 pairs that stand there twice"),
    ([pair("a", "b"), pair("b", "a")], "1 pairs that stand there with the opposite label"),
]


@cases("pairs, note", ODDITIES)
def test_an_oddity_is_kept_and_counted(pairs, note, capsys):
    """Nothing else is said."""
    kept = encoded(*pairs)
    assert len(kept.p) == len(pairs)
    assert capsys.readouterr().out == f"data, of {len(pairs)} pairs: {note}\n"


def test_the_same_prompt_with_another_answer_is_no_oddity(capsys):
    encoded(pair("a"), pair("b"))
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------ held-out pairs, batches

def held_out(pairs, share, seed=0):
    """(training, held-out) numbers of pairs, as lists."""
    train, held = data.hold_out(pairs, share, seed)
    return train.tolist(), held.tolist()


def forty_pairs():
    """Ten prompts, four pairs each."""
    return encoded(*[pair(f"a{i}", f"b{i}", f"q{i // 4}") for i in range(40)])


def test_the_share_is_of_prompts_rounded_down():
    train, held = held_out(forty_pairs(), 0.27)
    assert len(held) == 8
    assert sorted(train + held) == list(range(40))


def test_held_out_prompts_are_never_trained_on():
    train, held = held_out(forty_pairs(), 0.27)
    assert not {i // 4 for i in train} & {i // 4 for i in held}


def test_one_long_prompt_never_stands_in_both():
    """Its pairs' responses differ in length, so it is cut to different tokens."""
    pairs = [pair("a" * n, "b", "long" * 20) for n in range(1, 20)]
    train, held = held_out(encoded(*pairs, pair(prompt="short")), 0.5)
    assert sorted([len(train), len(held)]) == [1, 19]


def test_two_long_prompts_with_the_same_end_are_two():
    pairs = [pair("yes", "no", f"{i}" + "z" * 60) for i in range(4)]
    train, held = held_out(encoded(*pairs), 0.5)
    assert [len(train), len(held)] == [2, 2]


def test_another_seed_holds_out_others():
    _, some = held_out(forty_pairs(), 0.5)
    _, others = held_out(forty_pairs(), 0.5, seed=1)
    assert some != others


@cases("share", [0.0, 0.01])
def test_if_none_is_held_out_the_training_pairs_are_evaluated(share):
    train, held = held_out(forty_pairs(), share)
    assert train == list(range(40))
    assert held == train


def test_how_many_are_held_out_is_said(capsys):
    pairs = forty_pairs()
    held_out(pairs, 0.2)
    said = capsys.readouterr().out
    assert said == "data: 32 pairs to train on, 8 held out (if 0, all are evaluated)\n"


@cases("n, size", [(7, 3), (3, 7)])
def test_batches_see_every_pair_once_an_epoch(n, size):
    """21 in a row are all of 0..n-1 again and again, also if a batch is more than an epoch."""
    order = torch.cat([*data.shuffled(n, size, 21 // size, seeded())]).tolist()
    epochs = [order[i:i + n] for i in range(0, 21, n)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert epochs[0] != epochs[1]


def test_a_digest_is_of_rows_and_labels():
    """Another text, p or order is another digest; the same data have the same."""
    plain = encoded(pair("a", "b"), pair("c", "d")).digest()
    assert encoded(pair("a", "b"), pair("c", "d")).digest() == plain
    assert encoded(pair("b", "a"), pair("c", "d")).digest() != plain
    assert encoded(pair("c", "d"), pair("a", "b")).digest() != plain
    assert encoded(pair("a", "b"), pair("c", "d", p=0.9)).digest() != plain
    assert encoded(pair("a", "b"), pair("c", "e")).digest() != plain
    assert encoded(pair("a", "b", "qa"), pair("c", "d")).digest() != plain


def test_a_digest_tells_prompt_from_response():
    """The same tokens in a row, the border elsewhere."""
    one = encoded(pair("bc", "bd", "a"))
    other = encoded(pair("c", "d", "ab"))
    assert torch.equal(one.tokens, other.tokens)
    assert one.digest() != other.digest()


# ------------------------------------------------------------------------------------------------ the numbers

@cases("h, p, accuracy", [
    ("1 -1 0.0004", "1 1 1", 2 / 3),
    ("0 2", "1 1", 0.75),
    ("2 2", "0.9 0.1", 0.5),
    ("2 1", "0.5 1", 0.75),
    ("-3 -3", "0.2 0.4", 1),
])
def test_accuracy_counts_ties_one_half_and_reads_the_label(h, p, accuracy):
    """Ties in h or in p; a label below one half asks for the rejected response."""
    h, p = numbers(h), numbers(p)
    logp = torch.cat([h, 0 * h])
    ours = ipo.pair_numbers(logp, 0 * logp, p, options())
    assert ours["accuracy"] == approx(accuracy)


def test_numbers_of_pairs_against_numpy():
    rng = np.random.default_rng(0)
    logp, ref = rng.normal(size=6), rng.normal(size=6)
    p = np.array([1, 0.8, 0.3])
    ours = ipo.pair_numbers(f64(logp), f64(ref), f64(p), options("--tau", 0.5))
    chosen, rejected = (logp - ref)[:3], (logp - ref)[3:]
    h = chosen - rejected
    assert ours["h"] == approx(h.mean())
    assert ours["chosen"] == approx(chosen.mean())
    assert ours["rejected"] == approx(rejected.mean())
    assert ours["loss"] == approx(((h - (2 * p - 1)) ** 2).mean())


def test_what_is_infinite_or_unknown_is_none():
    """JSON has neither."""
    texts = {"a": "1 2", "b": "1 inf", "c": "nan", "d": "-1e6"}
    values = {name: numbers(text) for name, text in texts.items()}
    assert ipo.means(values) == {"a": 1.5, "b": None, "c": None, "d": None}


def test_numbers_are_told_in_one_line(capsys):
    """- for None, and never -0.0000."""
    ipo.told("step 1/2", {"loss": 1 / 3, "kl": None, "h": -1e-9})
    assert capsys.readouterr().out == "step 1/2        loss 0.3333  kl -  h 0.0000\n"


# ---------------------------------------------------------------------------------------------- the optimiser

def step_of(gradient, peak=1.0, step=1, steps=1):
    """By how much a step of plain gradient descent changes two weights with these gradients."""
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([gradient])
    optimizer = torch.optim.SGD(layer.parameters())
    ipo.optimizer_step(optimizer, step, steps, peak)
    assert layer.weight.grad is None
    return (before - layer.weight.detach())[0].tolist()


def test_a_gradient_of_norm_above_1_is_scaled_to_norm_1():
    assert step_of([3.0, -4.0]) == approx([0.6, -0.8])


def test_a_gradient_of_norm_below_1_stays():
    assert step_of([0.3, 0.4]) == approx([0.3, 0.4])


@cases("steps, step, rate", [
    (1, 1, 1),
    (4, 1, 1 / 2),
    (4, 2, 3 / 4),
    (4, 3, 1 / 2),
    (4, 4, 1 / 4),
    (2000, 1, 0.02),
    (2000, 25, 0.494),
    (2000, 50, 0.9755),
    (2000, 51, 0.975),
    (2000, 1001, 0.5),
    (2000, 2000, 0.0005),
])
def test_the_learning_rate_rises_and_falls(steps, step, rate):
    """A rise over 50 steps, or half of all, times a straight fall; by hand."""
    change = step_of([0.5, 0.0], 2.0, step, steps)
    assert change == approx([0.5 * 2 * rate, 0], rel=1e-3)


@cases("gradient", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run(gradient):
    with pytest.raises(ipo.Stopped, match="not finite; lower --lr or --sft_lr, or raise --tau"):
        step_of([gradient, 0.0])


def test_adam_is_torchs_without_weight_decay():
    """Three steps on the same gradients."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizers = ipo.adam(ours), torch.optim.Adam(theirs.parameters(), betas=(0.9, 0.99))
    for layer, optimizer in zip((ours, theirs), optimizers):
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-7)


# ----------------------------------------------------------------------------- a run is exactly the equations

def descend(policy, loss_of, steps, peak):
    """The losses of some steps of Adam; loss_of(number of the step, from 0)."""
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99))
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        rise = min(1, (step + 1) / (steps / 2))
        optimizer.param_groups[0]["lr"] = peak * rise * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def written_out_ipo(h, p):
    return (h - 5 * (2 * p - 1)) ** 2


def written_out_dpo(h, p):
    won = torch.log1p((-h / 10).exp())
    lost = torch.log1p((h / 10).exp())
    return p * won + (1 - p) * lost


class WrittenOut:
    """A run on a file: full logits, a second model as the reference, torch's Adam, seed 0, tau 0.1."""

    def __init__(self, source, loss):
        self.pairs, self.loss = source.pairs, loss
        torch.manual_seed(0)
        sizes = model.GPTConfig(64, 257, 257, n_layer=1, n_head=4, n_embd=16)
        self.policy = model.GPT(sizes)
        weight = torch.zeros(60)  # of the rows: 1 if the pair is one to train on
        weight[2 * source.train] = 1
        weight[2 * source.train + 1] = 1
        self.sft_rows = torch.multinomial(weight, 24, True, generator=seeded(0)).view(3, 8)
        order = torch.randperm(len(source.train), generator=seeded(1))[:24]
        self.batches = source.train[order].view(6, 4)

    def run(self):
        self.sft_losses = descend(self.policy, self.sft_loss, 3, 0.01)
        self.ref = copy.deepcopy(self.policy)
        self.losses = descend(self.policy, self.batch_loss, 6, 0.01)

    def sft_loss(self, step):
        tokens, mask = self.pairs.padded(self.sft_rows[step])
        return -plain_logp(self.policy, tokens, mask).sum() / mask.sum()

    def h(self, pairs):
        ratios = []
        for rows in (2 * pairs, 2 * pairs + 1):  # chosen, rejected
            tokens, mask = self.pairs.padded(rows)
            ref_logp = plain_logp(self.ref, tokens, mask).detach()
            ratios.append(plain_logp(self.policy, tokens, mask) - ref_logp)
        return ratios[0] - ratios[1]

    def batch_loss(self, step):
        pairs = self.batches[step]
        return self.loss(self.h(pairs), self.pairs.p[pairs]).mean()


@pytest.fixture(scope="module", params=[written_out_ipo, written_out_dpo])
def both(request, tmp_path_factory):
    """(what ipo.py prints, its report, the same run written out, its source)"""
    folder = tmp_path_factory.mktemp("run")
    name = request.param.__name__.removeprefix("written_out_")
    argv = ["--data", some_pairs(folder), *FILE, "--loss", name, "--block_size", 64, "--holdout", 0.2,
            "--lr", 0.01, "--sft_lr", 0.01, "--log_every", 1, "--out", folder / "out"]
    with mock.patch.object(ipo, "psi", identity):
        said = cli(*argv)
    source = ipo.FileSource(options(*argv))
    theirs = WrittenOut(source, request.param)
    theirs.run()
    return said, report(folder / "out"), theirs, source


def test_sft_is_these_steps(both):
    """Its losses, from the lines that are printed."""
    said, _, theirs, _ = both
    printed = re.findall(r"^SFT \d/3 +loss per token (\S+)", said, re.M)
    assert list(map(float, printed)) == approx(theirs.sft_losses, abs=2e-4)


def test_preference_training_is_these_steps(both):
    """The loss of each batch, before its update."""
    _, ours, theirs, _ = both
    losses = [line["batch loss"] for line in ours["log"]]
    assert losses == approx(theirs.losses, rel=1e-4)


def test_evaluation_is_of_the_held_out_pairs(both):
    """Six of thirty: the means of h and of the loss."""
    _, ours, theirs, source = both
    held = torch.tensor(sorted({*range(30)} - {*source.train.tolist()}))
    h = theirs.h(held)
    loss = theirs.loss(h, source.pairs.p[held])
    assert len(held) == 6
    assert ours["after"]["h"] == approx(h.mean().item(), rel=1e-3, abs=1e-5)
    assert ours["after"]["loss"] == approx(loss.mean().item(), rel=1e-4)


def test_the_log_is_that_of_the_report(both):
    _, ours, _, _ = both
    last = dict(ours["log"][-1])
    assert last.pop("step") == 6
    last.pop("batch loss")
    assert last == ours["after"]


# ----------------------------------------------------------------------------------------------------- step 0

@cases("loss, tau, p, expected", [
    ("ipo", 0.1, 1, 25),
    ("ipo", 0.2, 1, 6.25),
    ("ipo", 0.1, 0.8, 9),
    ("dpo", 0.1, 1, 0.693147),
])
def test_the_loss_at_the_start_is_that_of_no_margin(tmp_path, loss, tau, p, expected):
    """Target squared, or log 2."""
    path = write(tmp_path / "p.jsonl", *[pair(f"a{i}", p=p) for i in range(9)])
    said = cli("--data", path, *FILE, "--loss", loss, "--tau", tau, "--out", tmp_path)
    assert float(re.search("step 0: loss (.*),", said)[1]) == approx(expected, rel=1e-4)


def start(tmp_path, ref_logp, dtype="float32"):
    """Begins training byte_gpt() on two pairs with this ref_logp(honest one)."""
    args = options("--data", "x", "--tokenizer", "bytes", "--dtype", dtype, "--out", tmp_path)
    policy, pairs = byte_gpt(std=0.1), encoded(pair("ab" * 9, "c"), pair("d", "e"))
    honest = ipo.score(policy, pairs, args)
    pairs.ref_logp = ref_logp(honest)
    batch = pairs.batch(torch.arange(2))
    ipo.train(policy, [batch], args, lambda policy: {})


@cases("dtype", ["float32", "bfloat16"])
def test_an_honest_reference_starts(tmp_path, dtype):
    start(tmp_path, lambda honest: honest, dtype)


def other_model(honest):
    pairs = encoded(pair("ab" * 9, "c"), pair("d", "e"))
    return ipo.score(byte_gpt(1, std=0.1), pairs, options())


def one_off(nats):
    """The reference, off by this in one row."""
    def shifted(honest):
        return honest + nats * (torch.arange(4) == 1)
    return shifted


@cases("wrong, dtype", [
    (other_model, "float32"),
    (other_model, "bfloat16"),
    (one_off(0.05), "float32"),
    (one_off(0.6), "bfloat16"),
    (one_off(-0.6), "bfloat16"),
    (one_off(math.nan), "float32"),
    (lambda honest: honest.flip(0), "float32"),
])
def test_a_wrong_reference_stops_the_run(tmp_path, wrong, dtype):
    """Nothing is saved."""
    with pytest.raises(ipo.Stopped, match="before the first step a margin is not 0: ref_logp is not"):
        start(tmp_path, wrong, dtype)
    assert not os.listdir(tmp_path)


def test_a_margin_of_rounding_is_no_fault():
    """Every log-prob is off by .05 from its float32 value, so a margin may be off by .1."""
    policy, pairs = byte_gpt(), encoded(pair("ab", "c"), pair("d", "e"))
    pairs.ref_logp = ipo.score(policy, pairs, options())
    batch = pairs.batch(torch.arange(2))
    rounded = batch.ref_logp + 0.05 * numbers("1 -1 -1 1")
    ipo.check_start(policy, batch, rounded, torch.tensor(0.0))


def test_a_run_in_bfloat16_computes_in_it_all_the_way(small_world, tmp_path):
    """SFT, scoring, training; but for one pass, that of the start check."""
    plain, calls = ipo.sequence_logp, []

    def spy(*call):
        calls.append(torch.is_autocast_enabled("cpu"))
        return plain(*call)

    with mock.patch.object(ipo, "sequence_logp", spy):
        cli(*WORLD, "--dtype", "bfloat16", "--out", tmp_path)
    assert calls.count(False) == 1
    assert calls.count(True) > 20


def test_a_margin_beyond_rounding_stops_a_run_in_bfloat16(tmp_path):
    """Eight times what the same rows lose between float32 and bfloat16."""
    pairs, policy = encoded(pair("ab" * 9, "c"), pair("d", "e")), byte_gpt(std=0.1)
    exact = ipo.score(policy, pairs, options())
    rounded = ipo.score(policy, pairs, options("--dtype", "bfloat16"))
    rounding = (rounded - exact).abs().max().item()
    with pytest.raises(ipo.Stopped, match="a margin is not 0"):
        start(tmp_path, one_off(8 * rounding + 0.02), "bfloat16")


# ------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """(folder, what is printed) of `python ipo.py --loss ipo`, in full."""
    folder = tmp_path_factory.mktemp("default")
    with mock.patch.object(ipo, "psi", identity):
        return folder, cli("--loss", "ipo", "--out", folder)


def test_training_brings_the_language_model_to_the_optimum(default_run):
    """98 % of the distance to pi* is gone."""
    ours = report(default_run[0])
    assert ours["after"]["kl_opt"] < ours["ref"]["kl_opt"] / 50


def test_the_reference_is_where_it_starts(default_run):
    ours = report(default_run[0])["ref"]
    assert ours["kl_ref"] == 0
    assert ours["h"] == 0
    assert ours["accuracy"] == 0.5
    assert ours["loss"] == approx(6.25)


def test_the_optimum_is_at_no_distance_from_itself(default_run):
    ours = report(default_run[0])
    assert ours["opt"]["kl_opt"] == approx(0, abs=1e-12)
    assert ours["opt"]["kl_ref"] > 0.1


def test_the_log_has_a_line_every_log_every_steps(default_run):
    steps = [line["step"] for line in report(default_run[0])["log"]]
    assert steps == list(range(200, 2201, 200))


def test_the_last_step_is_logged_too(small_world, tmp_path):
    cli(*WORLD, "--steps", 7, "--log_every", 3, "--out", tmp_path)
    steps = [line["step"] for line in report(tmp_path)["log"]]
    assert steps == [3, 6, 7]
    assert model.read(f"{tmp_path}/ckpt.pt")["step"] == 7


def test_a_run_leaves_three_files(default_run):
    assert sorted(os.listdir(default_run[0])) == ["ckpt.pt", "ref.pt", "report.json"]


def scored(folder, name, *argv):
    """log pi(y|x) of every response (4,400), of the policy in a run's file."""
    world = ipo.WorldSource(options(*argv))
    policy, _ = model.load(f"{folder}/{name}.pt")
    return world.table(policy)


def test_the_distances_are_those_of_the_saved_policies(default_run):
    """KL of enumerated policies, and of pi* from the saved reference."""
    ours, world = report(default_run[0])["after"], data.World("bt")
    ref, pi = scored(default_run[0], "ref"), scored(default_run[0], "ckpt")
    best = data.optimum(ref, world.pstar, torch.full_like(ref, 1 / 400), 0.2)
    assert ours["kl_ref"] == approx(data.kl(pi, ref).item(), rel=1e-3)
    assert ours["kl_opt"] == approx(data.kl(pi, best).item(), rel=1e-3)


@cases("column", ["opt", "after"])
def test_the_margin_is_the_mean_over_pairs_of_mu(default_run, column):
    """h = E[(2p - 1) h(y,y')], which the half million pairs have to .01."""
    p, ref = data.World("bt").pstar, scored(default_run[0], "ref")
    pi = scored(default_run[0], "ckpt")
    if column == "opt":
        pi = data.optimum(ref, p, torch.full_like(ref, 1 / 400), 0.2)
    f = pi - ref
    h = f[:, :, None] - f[:, None, :]
    expected = ((2 * p - 1) * h).mean().item()
    assert report(default_run[0])[column]["h"] == approx(expected, abs=0.01)


def test_the_cache_is_of_the_reference(default_run):
    cache = model.read(f"{default_run[0]}/ref.pt")["ref_logp"].view(4, 400)
    ref = scored(default_run[0], "ref")
    assert torch.allclose(cache.double(), ref, atol=1e-5)


def test_the_reference_is_what_sft_showed_it(default_run):
    base = data.World("bt").base[1:]  # the first text, the empty one, has probability 0
    ref = scored(default_run[0], "ref")[:, 1:]
    distance = (base * (base.log() - ref)).sum(-1)
    assert distance.max() < 0.01


def test_a_finished_run_is_asked(default_run):
    """--sample prints the prompt and what the model says."""
    policy, _ = model.load(f"{default_run[0]}/ckpt.pt")
    expected = model.generate(policy, data.Words(data.WORDS), "pizza review:", 1.0, 3)
    said = cli("--out", default_run[0], "--seed", 3, "--sample", "pizza review:")
    assert said == f"pizza review:{expected}\n"


def test_another_file_is_asked_at_temperature_0(default_run):
    path = default_run[0] / "ref.pt"
    policy, _ = model.load(str(path))
    expected = model.generate(policy, data.Words(data.WORDS), "beer review:", 0)
    said = cli("--init_from", path, "--temperature", 0, "--sample", "beer review:")
    assert said == f"beer review:{expected}\n"


def test_a_prompt_of_other_words_is_refused(default_run):
    refused("the world has no word 'sushi'", "--out", default_run[0], "--sample", "sushi review:")


def test_a_prompt_without_room_for_an_answer_is_refused(default_run):
    refused("a prompt of 5 tokens fills the context of 5",
            "--out", default_run[0], "--sample", "pizza review: hot hot hot")


NARROW = "--n_embd", 16, "--batch_size", 64


@cases("argv, bound", [
    ("--data cyclic --labels soft --tau 0.5 --steps 200", 0.003),
    ("--mu ref --tau 1 --steps 150", 0.002),
    ("--loss dpo --labels soft --tau 2 --steps 200", 0.002),
])
def test_a_short_run_reaches_the_optimum(small_world, tmp_path, argv, bound):
    """Intransitive and soft, mu the reference, or DPO: four fifths of the way, and below the bound."""
    cli(*argv.split(), "--pairs", 50_000, "--sft_steps", 40, *NARROW, "--out", tmp_path)
    ours = report(tmp_path)
    assert ours["after"]["kl_opt"] < bound
    assert ours["after"]["kl_opt"] < ours["ref"]["kl_opt"] / 5


def deterministic(folder, loss, steps):
    """The report of a run in the deterministic world."""
    cli("--data", "deterministic", "--tau", 1, "--pairs", 30_000, "--sft_steps", 30, *NARROW,
        "--loss", loss, "--steps", steps, "--out", folder)
    return report(folder)


def test_in_the_deterministic_world_dpo_never_stops(small_world, tmp_path):
    """It goes further from the reference with the steps, towards a limit that no policy attains."""
    short, long = deterministic(tmp_path, "dpo", 50), deterministic(tmp_path, "dpo", 150)
    assert long["after"]["kl_ref"] > short["after"]["kl_ref"] + 0.2
    assert long["opt"]["kl_ref"] > long["after"]["kl_ref"]
    assert long["opt"]["kl_opt"] == 0


def test_the_distance_to_dpos_limit_is_infinite(small_world, tmp_path):
    ours = deterministic(tmp_path, "dpo", 10)
    assert ours["ref"]["kl_opt"] is None


def test_in_the_deterministic_world_ipo_ends_at_its_optimum(small_world, tmp_path):
    ours = deterministic(tmp_path, "ipo", 150)
    assert ours["after"]["kl_opt"] < 0.02


def test_a_run_in_bfloat16_is_scored_in_bfloat16(small_world, tmp_path):
    """It starts, and its distances are those of the policies as the loop sees them."""
    assert "step 0: loss 6.25" in cli(*WORLD, "--dtype", "bfloat16", "--out", tmp_path)
    policies = [scored(tmp_path, name, "--dtype", "bfloat16") for name in ("ckpt", "ref")]
    distance = data.kl(*policies).item()
    assert report(tmp_path)["after"]["kl_ref"] == approx(distance, rel=1e-3)
    assert not torch.equal(policies[0], scored(tmp_path, "ckpt"))


def test_weights_stay_float32_in_bfloat16(small_world, tmp_path):
    cli(*WORLD, "--dtype", "bfloat16", "--out", tmp_path)
    for p in model.read(f"{tmp_path}/ckpt.pt")["model"].values():
        assert p.dtype == torch.float32


def test_an_edit_of_psi_is_reported(small_world, tmp_path):
    """An assignment: pi* changes, and with it its numbers."""
    cli(*WORLD, "--labels", "soft", "--out", tmp_path / "paper")
    ipo.psi = steep
    cli(*WORLD, "--labels", "soft", "--out", tmp_path / "mine")
    paper = report(tmp_path / "paper")["opt"]
    mine = report(tmp_path / "mine")["opt"]
    assert mine["kl_ref"] > 2 * paper["kl_ref"]
    assert mine["h"] > 1.5 * paper["h"]


def test_an_edit_of_psi_is_trained(small_world, tmp_path):
    """Twice the paper's Psi asks for twice the margin, four times the loss at the start."""
    ipo.psi = lambda q: 2 * q
    assert "step 0: loss 25," in cli(*WORLD, "--out", tmp_path)


def test_an_infinite_target_is_refused_with_the_lesson(tmp_path):
    ipo.psi = torch.logit
    refused("infinite at 0 or 1 (as logit is); use another psi", *WORLD, "--out", tmp_path)
    assert not os.listdir(tmp_path)


def test_soft_labels_of_certain_preferences_are_refused_too(tmp_path):
    ipo.psi = torch.logit
    argv = "--data", "deterministic", "--labels", "soft"
    refused("a label asks for an infinite margin", *WORLD, *argv, "--out", tmp_path)


def test_soft_labels_with_logit_train(small_world, tmp_path):
    ipo.psi = torch.logit
    cli(*WORLD, "--labels", "soft", "--out", tmp_path)


@cases("flag, kept", [("--lr", ["ref.pt"]), ("--sft_lr", ["ref.pt"])])
def test_divergence_stops_the_run(small_world, tmp_path, flag, kept):
    """Status 1, one line; no weights that are not finite are saved."""
    cli(*WORLD, flag, 1e9, "--out", tmp_path, status=1, says="lower --lr")
    assert os.listdir(tmp_path) == kept
    policy, _ = model.load(f"{tmp_path}/ref.pt")
    for p in policy.parameters():
        assert p.isfinite().all()


def test_divergence_in_the_last_step_stops_the_run(small_world, tmp_path):
    """Its gradient was finite; its weights are not."""
    def ruin(optimizer, *rest):
        for p in optimizer.param_groups[0]["params"]:
            p.data.fill_(math.nan)

    with mock.patch.object(ipo, "optimizer_step", ruin):
        cli(*WORLD, "--sft_steps", 0, "--steps", 1, "--out", tmp_path,
            status=1, says="step 1: h is not finite, or over 10,000 nats; lower --lr")
    assert os.listdir(tmp_path) == ["ref.pt"]


# ----------------------------------------------------------------------------------------- from other weights

@pytest.fixture
def offline_gpt2(monkeypatch):
    """Bytes under the name of GPT-2's tokens, with its number of ids."""
    ids = {bytes([byte]): byte for byte in range(256)}
    encoding = data.tiktoken.Encoding("gpt2", pat_str="(?s).", mergeable_ranks=ids,
                                      special_tokens={data.EOT: 50256})
    monkeypatch.setattr(data.tiktoken, "get_encoding", {"gpt2": encoding}.get)


FEW = ["--steps", "2", "--batch_size", "4"]


def test_a_run_from_gpt2_has_it_as_the_reference(tmp_path, offline_gpt2):
    """Without SFT; its context is kept."""
    hugging_face().save_pretrained(tmp_path / "hf")
    flags = "--data", some_pairs(tmp_path), *FEW, "--init_from", tmp_path / "hf"
    said = cli(*flags, "--out", tmp_path / "a")
    ref, tokenizer = model.load(f"{tmp_path}/a/ref.pt")
    assert "SFT" not in said
    assert same_weights(ref, model.from_gpt2(str(tmp_path / "hf")))
    assert tokenizer == "gpt2"
    assert report(tmp_path / "a")["flags"]["block_size"] == 64


def first_run(tmp_path):
    """The flags of a finished run on a file, without --out."""
    flags = "--data", some_pairs(tmp_path)
    cli(*flags, *FILE, "--block_size", 50, "--out", tmp_path / "a")
    return *flags, *FEW, "--log_every", 1


def test_a_run_from_another_has_its_policy_as_the_reference(tmp_path):
    flags = first_run(tmp_path)
    cli(*flags, "--init_from", tmp_path / "a/ckpt.pt", "--out", tmp_path / "b")
    b, tokenizer = model.load(f"{tmp_path}/b/ref.pt")
    assert same_weights(b, model.load(f"{tmp_path}/a/ckpt.pt")[0])
    assert tokenizer == "bytes"
    assert report(tmp_path / "b")["flags"]["block_size"] == 50


def test_sft_of_other_weights_is_done_when_asked_for(tmp_path):
    flags = first_run(tmp_path)
    said = cli(*flags, "--init_from", tmp_path / "a/ckpt.pt", "--sft_steps", 1, "--out", tmp_path / "b")
    assert "SFT 1/1" in said
    b, _ = model.load(f"{tmp_path}/b/ref.pt")
    assert not same_weights(b, model.load(f"{tmp_path}/a/ckpt.pt")[0])


def test_a_run_from_another_in_a_world(small_world, tmp_path):
    """Its reference is the other's policy, and its pi* that of this reference."""
    cli(*WORLD, "--out", tmp_path / "a")
    cli(*WORLD[:4], "--init_from", tmp_path / "a/ckpt.pt", "--out", tmp_path / "b")
    a, b = scored(tmp_path / "a", "ckpt"), scored(tmp_path / "b", "ref")
    assert torch.equal(a, b)


def test_weights_that_know_other_tokens_are_refused(small_world, tmp_path):
    flags = first_run(tmp_path)
    cli(*WORLD, "--out", tmp_path / "w")
    refused("knows the tokens of bytes, and --data bt has those of words; use weights of the same kind",
            "--init_from", tmp_path / "a/ckpt.pt", "--out", tmp_path / "b")
    refused("the world has no word", *flags, "--init_from", tmp_path / "w/ckpt.pt", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_gpt2_in_a_world_is_refused(tmp_path):
    hugging_face().save_pretrained(tmp_path / "hf")
    refused("knows the tokens of gpt2, and --data bt has those of words",
            "--init_from", tmp_path / "hf", "--out", tmp_path / "b")


# ---------------------------------------------------------------------------------------- a run to be trusted

def contents(folder):
    """{name: bytes} of its files."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def outcome(folder):
    """What a run leaves, but its flags: bit for bit."""
    states = {"report.json": report(folder)}
    for name in ("ref.pt", "ckpt.pt"):
        states[name] = model.read(f"{folder}/{name}")
    for state in states.values():
        state.pop("flags")
    return json.dumps(states, default=lambda tensor: tensor.numpy().tobytes().hex())


def flags_of(kind, folder, *more):
    """A short run of this kind that saves every three steps, without --out."""
    flags = WORLD
    if kind == "file":
        flags = ["--data", some_pairs(folder), *FILE]
    return [*flags, "--steps", 12, "--log_every", 3, "--seed", 3, *more]


@cases("kind", ["world", "file"])
def test_the_same_seed_is_the_same_run(small_world, tmp_path, kind):
    flags = flags_of(kind, tmp_path)
    cli(*flags, "--out", tmp_path / "a")
    cli(*flags, "--out", tmp_path / "b")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@cases("kind", ["world", "file"])
def test_another_seed_has_other_weights_at_the_start(small_world, tmp_path, kind):
    flags = flags_of(kind, tmp_path, "--sft_steps", 0)
    for seed in (0, 1):
        cli(*flags, "--seed", seed, "--out", tmp_path / str(seed))
    one, _ = model.load(f"{tmp_path}/0/ref.pt")
    other, _ = model.load(f"{tmp_path}/1/ref.pt")
    assert not same_weights(one, other)


def test_what_is_drawn_depends_on_the_seed_and_the_use():
    """Three uses of ten seeds: thirty different first numbers."""
    first = set()
    for seed in range(10):
        for use in range(3):
            random = ipo.generator(options("--seed", seed), use)
            first.add(torch.rand(1, generator=random).item())
    assert len(first) == 30


def stopped(owner, name, n, error=SystemExit):
    """Within this context the nth call of owner.name raises the error instead."""
    effects = [mock.DEFAULT] * (n - 1) + [error]
    return mock.patch.object(owner, name, wraps=getattr(owner, name), side_effect=effects)


@contextlib.contextmanager
def stopped_within_save(n):
    """Within this context the nth file is written to its half."""
    save, calls = torch.save, itertools.count(1)

    def half(content, path):
        save(content, path)
        if next(calls) == n:
            os.truncate(path, os.path.getsize(path) // 2)
            raise SystemExit

    with mock.patch.object(torch, "save", half):
        yield


STOPS = {
    "before the flags are in place": (os, "replace", 1),
    "before the reference is in place": (os, "replace", 2),
    "before the first checkpoint is in place": (os, "replace", 3),
    "before the last checkpoint is in place": (os, "replace", 6),
    "in the first step of SFT": (ipo, "optimizer_step", 1),
    "in the last step of SFT": (ipo, "optimizer_step", 3),
    "when the reference is scored": (ipo, "sequence_logp", 5),
    "in the first step of training": (ipo, "check_start", 1),
    "in a step before the first checkpoint": (ipo, "optimizer_step", 6),
    "in a step between two checkpoints": (ipo, "optimizer_step", 10),
    "between evaluation and log": (ipo, "told", 3),
    "before the report is written": (json, "dump", 1),
}


@pytest.fixture(scope="module", params=["world", "file"])
def whole(request, tmp_path_factory):
    """(flags, folder) of a run that nothing stopped, in the small world or on a file."""
    folder = tmp_path_factory.mktemp("whole")
    flags = flags_of(request.param, folder)
    with mock.patch.object(data.World.__init__, "__defaults__", SMALL_WORLD):
        with mock.patch.object(ipo, "psi", identity):
            cli(*flags, "--out", folder / "out")
    return flags, folder / "out"


@cases("moment", list(STOPS)[1:])
def test_a_resumed_run_is_the_same_run(small_world, whole, tmp_path, moment):
    """Weights, optimiser, log and report, bit for bit."""
    flags, folder = whole
    with stopped(*STOPS[moment]), pytest.raises(SystemExit):
        cli(*flags, "--out", tmp_path)
    assert not (tmp_path / "report.json").exists() or not (tmp_path / "report.json").read_text()
    cli("--resume", "--out", tmp_path)
    assert outcome(tmp_path) == outcome(folder)


@cases("n", [2, 3, 5])
def test_a_run_that_was_stopped_half_way_in_a_save_is_the_same_run(small_world, whole, tmp_path, n):
    flags, folder = whole
    with stopped_within_save(n), pytest.raises(SystemExit):
        cli(*flags, "--out", tmp_path)
    cli("--resume", "--out", tmp_path)
    assert outcome(tmp_path) == outcome(folder)


def test_a_run_that_was_stopped_before_it_saved_begins_again(small_world, whole, tmp_path):
    """There is nothing to resume, and nothing that stands in the way."""
    flags, folder = whole
    with stopped(os, "replace", 1), pytest.raises(SystemExit):
        cli(*flags, "--out", tmp_path)
    refused("No such file or directory", "--resume", "--out", tmp_path)
    cli(*flags, "--out", tmp_path)
    assert outcome(tmp_path) == outcome(folder)


def test_a_run_may_be_stopped_and_resumed_many_times(small_world, whole, tmp_path):
    flags, folder = whole
    with stopped(ipo, "optimizer_step", 2), pytest.raises(SystemExit):
        cli(*flags, "--out", tmp_path)
    for steps in (10, 5, 2):
        with stopped(ipo, "optimizer_step", steps), pytest.raises(SystemExit):
            cli("--resume", "--out", tmp_path)
    cli("--resume", "--out", tmp_path)
    assert outcome(tmp_path) == outcome(folder)


def test_a_finished_run_that_is_resumed_stays_as_it_is(small_world, whole, tmp_path):
    flags, folder = whole
    before = outcome(folder)
    assert "resumed after step 12" in cli("--resume", "--out", folder)
    assert outcome(folder) == before


def test_an_interruption_is_one_line(small_world, whole, tmp_path):
    """Ctrl-C; status 1."""
    flags, _ = whole
    with stopped(ipo, "optimizer_step", 10, KeyboardInterrupt):
        cli(*flags, "--out", tmp_path, status=1,
            says="interrupted; --resume goes on where it was saved")
    assert "resumed after step" in cli("--resume", "--out", tmp_path)


def test_a_full_disk_loses_nothing(small_world, whole, tmp_path):
    """The third file cannot be written: one line; with room again the run ends as any."""
    flags, folder = whole
    with stopped(torch, "save", 4, OSError(28, "No space left on device")):
        refused("ckpt.pt: cannot be written", *flags, "--out", tmp_path)
    assert "resumed after step 3" in cli("--resume", "--out", tmp_path)
    assert outcome(tmp_path) == outcome(folder)


def test_a_renamed_folder_is_resumed(small_world, whole, tmp_path):
    flags, folder = whole
    with stopped(ipo, "optimizer_step", 10), pytest.raises(SystemExit):
        cli(*flags, "--out", tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert "resumed after step" in cli("--resume", "--out", tmp_path / "b")
    assert outcome(tmp_path / "b") == outcome(folder)


def test_a_run_of_another_device_is_resumed_on_this_one(small_world, whole, tmp_path):
    """As a GPU's run on a machine without one: --device is not that of the saved flags."""
    flags, folder = whole
    with stopped(ipo, "optimizer_step", 10), pytest.raises(SystemExit):
        cli(*flags, "--out", tmp_path)
    for name in ("ref.pt", "ckpt.pt"):
        edit_flags(tmp_path / name, device="cuda")
    cli("--resume", "--out", tmp_path)
    assert outcome(tmp_path) == outcome(folder)


def edit_flags(path, **changes):
    """Saves a run's file anew, sealed, with other flags."""
    content = model.read(str(path))
    policy, _ = model.load(str(path))
    flags = Namespace(**content.pop("flags") | changes)
    del content["model"], content["sizes"]
    model.save(str(path), policy, flags, **content)


KILLED = """
import itertools, os, sys, ipo
calls, save, ipo.psi = itertools.count(1), os.replace, lambda q: q
os.replace = lambda *names: os.kill(os.getpid(), 9) if next(calls) == 4 else save(*names)
ipo.main(sys.argv[1:])
"""


def test_kill_9_loses_nothing(tmp_path):
    """A process that dies in its fourth save, then goes on: it is the same seed's run."""
    flags = [*WORLD, "--log_every", "4", "--sft_steps", "0", "--device", "cpu"]
    command = [sys.executable, "-c", KILLED, *flags, "--out", tmp_path / "0"]
    died = subprocess.run(command, cwd=HERE)
    assert died.returncode == -9
    assert "resumed after step 4" in cli("--resume", "--out", tmp_path / "0")
    cli(*flags, "--out", tmp_path / "whole")
    assert outcome(tmp_path / "0") == outcome(tmp_path / "whole")


# ---------------------------------------------------------------------------------------- what is not resumed

@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The folder of pairs.jsonl and of a run on it, stopped after two of its checkpoints."""
    folder = tmp_path_factory.mktemp("halves")
    flags = [*flags_of("file", folder), "--data", "pairs.jsonl", "--out", "out"]
    with contextlib.chdir(folder), mock.patch.object(ipo, "psi", identity):
        with stopped(ipo, "optimizer_step", 10), pytest.raises(SystemExit):
            cli(*flags)
    return folder


@pytest.fixture
def interrupted(halves, tmp_path, monkeypatch):
    """A copy of that folder, where this process is now; its data."""
    shutil.copytree(halves, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pairs.jsonl"


def swapped_labels(rows):
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def another_p(rows):
    return [rows[0] | {"p": 0.3}, *rows[1:]]


CHANGES = {
    "labels swapped": swapped_labels,
    "rows reordered": lambda rows: rows[::-1],
    "two rows exchanged": lambda rows: [rows[1], rows[0], *rows[2:]],
    "one row more": lambda rows: [*rows, pair("new", "newer")],
    "one row fewer": lambda rows: rows[:-1],
    "another p": another_p,
    "another text": lambda rows: [pair("other", "texts"), *rows[1:]],
}


@cases("change", CHANGES)
def test_data_that_changed_are_not_trained_on(interrupted, tmp_path, change):
    """One line, nothing lost; with the old data the run goes on."""
    path = interrupted
    before, old = contents(tmp_path / "out"), path.read_text()
    write(path, *CHANGES[change](rows_of_pairs()))
    refused("is not what it was when this run began; bring it back", "--resume", "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    path.write_text(old)
    assert "resumed after step 6" in cli("--resume", "--out", tmp_path / "out")


def test_data_that_are_gone_are_missed(interrupted, tmp_path):
    before = contents(tmp_path / "out")
    interrupted.unlink()
    refused("pairs.jsonl: no such file", "--resume", "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def cut(path):
    os.truncate(path, 3000)


def foreign(path):
    torch.save({"step": 1}, path)


def saved_again(path):
    content = torch.load(path, weights_only=True)
    content["model"]["transformer.ln_f.bias"] += 1
    torch.save(content, path)


def emptied(path):
    path.write_bytes(b"")


@cases("name", ["ref.pt", "ckpt.pt"])
@cases("damage", [cut, foreign, saved_again, emptied])
def test_a_damaged_or_foreign_file_is_not_resumed(interrupted, tmp_path, name, damage):
    """One line that names it; nothing is changed."""
    damage(tmp_path / "out" / name)
    before = contents(tmp_path / "out")
    refused(f"{name}: not what a run saved", "--resume", "--out", "out")
    assert contents(tmp_path / "out") == before


def test_a_checkpoint_of_another_run_is_not_resumed(interrupted, tmp_path):
    """It is named; when it is removed, the run goes on from its reference."""
    flags = ["--data", interrupted, *FILE, "--tau", 0.5]
    cli(*flags, "--out", tmp_path / "other")
    checkpoint = tmp_path / "out/ckpt.pt"
    checkpoint.write_bytes((tmp_path / "other/ckpt.pt").read_bytes())
    refused("ckpt.pt is of another run than ref.pt beside it; remove it",
            "--resume", "--out", tmp_path / "out")
    checkpoint.unlink()
    assert "resumed" not in cli("--resume", "--out", tmp_path / "out")


def test_a_reference_is_no_checkpoint(interrupted, tmp_path):
    """ref.pt under the name of ckpt.pt."""
    reference = (tmp_path / "out/ref.pt").read_bytes()
    (tmp_path / "out/ckpt.pt").write_bytes(reference)
    refused("ckpt.pt is of another run than ref.pt", "--resume", "--out", tmp_path / "out")


def test_weights_of_another_model_are_not_resumed(tmp_path):
    """A run of a model of one's own, resumed by the command line, which has a GPT."""
    args = options("--data", some_pairs(tmp_path), *FILE, "--out", tmp_path)
    args.block_size = 64
    ipo.run(args, HuggingFace())
    refused("the saved weights are those of another model", "--resume", "--out", tmp_path)


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    refused("No such file or directory", "--resume", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# -------------------------------------------------------------------------------------------- nothing is lost

def test_a_finished_run_in_a_world_is_replaced_by_the_next(small_world, tmp_path):
    """`python ipo.py` twice in a row; it takes seconds to make again."""
    cli(*WORLD, "--out", tmp_path)
    said = cli(*WORLD, "--seed", 1, "--out", tmp_path)
    assert "ref.pt of an earlier run is removed" in said
    assert report(tmp_path)["flags"]["seed"] == 1


def kept(message, folder, *argv):
    """The command is refused in one line, and the folder is as it was."""
    before = contents(folder)
    refused(message, *argv, "--out", folder)
    assert contents(folder) == before


HOLDS = "holds a run; --resume it, --overwrite it, or name another --out"


def test_an_unfinished_run_is_not_replaced(small_world, tmp_path):
    with stopped(ipo, "optimizer_step", 15), pytest.raises(SystemExit):
        cli(*WORLD, "--out", tmp_path)
    kept(HOLDS, tmp_path, *WORLD)


def test_a_run_on_a_file_is_not_replaced(tmp_path):
    path = some_pairs(tmp_path)
    cli("--data", path, *FILE, "--out", tmp_path / "out")
    kept(HOLDS, tmp_path / "out", "--data", path, *FILE)
    kept(HOLDS, tmp_path / "out", *WORLD)


def test_what_a_psi_that_is_infinite_finds_is_kept(small_world, tmp_path):
    """Exercise 3: a finished run, then psi = logit with hard labels."""
    cli(*WORLD, "--out", tmp_path)
    ipo.psi = torch.logit
    kept("a label asks for an infinite margin", tmp_path, *WORLD)


def test_a_refused_command_keeps_what_is_there(small_world, tmp_path):
    """An empty shell variable as --sample neither trains nor replaces."""
    cli(*WORLD, "--out", tmp_path)
    kept("--sample is ''", tmp_path, "--sample", "")
    kept("--n_embd 30 is no multiple", tmp_path, "--n_embd", 30, "--n_head", 4)
    kept("no.jsonl", tmp_path, "--data", "no.jsonl", "--tokenizer", "bytes")
    kept("no.pt: not what a run saved", tmp_path, "--init_from", "no.pt")
    kept("--tau is '0'", tmp_path, "--tau", 0)
    kept("--tau does nothing here", tmp_path, "--resume", "--tau", 1)


def test_sizes_beyond_memory_keep_what_is_there(small_world, tmp_path):
    cli(*WORLD, "--out", tmp_path)
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
    with mock.patch.object(model, "GPT", side_effect=error):
        kept("can't allocate memory", tmp_path, *WORLD)


def test_a_fault_of_ours_is_no_bad_input(small_world, tmp_path):
    """Its traceback is seen."""
    with mock.patch.object(model, "GPT", side_effect=RuntimeError("shapes differ")):
        with pytest.raises(RuntimeError, match="shapes differ"):
            cli(*WORLD, "--out", tmp_path)


@cases("finished", [True, False])
def test_overwrite_replaces_any_run(tmp_path, finished):
    path = some_pairs(tmp_path)
    flags = "--data", path, *FILE, "--out", tmp_path / "out"
    cli(*flags)
    if not finished:
        (tmp_path / "out/report.json").unlink()
    cli(*flags, "--tau", 0.5, "--overwrite")
    assert report(tmp_path / "out")["flags"]["tau"] == 0.5


def test_of_a_run_that_was_replaced_nothing_is_left(tmp_path):
    """The new one is stopped in its first step."""
    flags = "--data", some_pairs(tmp_path), *FILE
    cli(*flags, "--out", tmp_path / "out")
    with stopped(ipo, "optimizer_step", 1, KeyboardInterrupt):
        cli(*flags, "--overwrite", "--out", tmp_path / "out", status=1)
    assert os.listdir(tmp_path / "out") == ["ref.pt"]


def test_a_replaced_run_is_resumed_like_any_other(tmp_path):
    """--overwrite is no part of the run that is resumed."""
    flags = "--data", some_pairs(tmp_path), *FILE
    cli(*flags, "--out", tmp_path / "whole")
    cli(*flags, "--seed", 5, "--out", tmp_path / "out")
    with stopped(ipo, "optimizer_step", 7), pytest.raises(SystemExit):
        cli(*flags, "--overwrite", "--out", tmp_path / "out")
    assert "resumed after step 2" in cli("--resume", "--out", tmp_path / "out")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_other_files_in_the_folder_are_nobodys_business(small_world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    cli(*WORLD, "--out", tmp_path)
    cli(*WORLD, "--out", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -------------------------------------------------------------------------------------------------- the flags

# each kind of run, and the flags that do nothing for it
DOES_NOTHING = """
                       -> tokenizer holdout block_size temperature
--data x               -> labels mu pairs temperature
--init_from x          -> tokenizer holdout block_size n_layer n_head n_embd temperature
--data x --init_from y -> labels mu pairs tokenizer block_size n_layer n_head n_embd temperature
--sample x             -> loss tau data labels mu pairs tokenizer holdout block_size
--sample x             -> steps batch_size lr sft_steps sft_lr log_every n_layer n_head n_embd
--sample x             -> dtype overwrite
--resume               -> loss tau data init_from labels mu pairs tokenizer holdout block_size
--resume               -> steps batch_size lr sft_steps sft_lr log_every n_layer n_head n_embd
--resume               -> dtype seed sample temperature overwrite
"""
# a value of each flag that it takes and that is not its default
VALUES = {
    "loss": "dpo", "tau": "0.7", "labels": "soft", "mu": "ref", "pairs": "7", "out": "there",
    "tokenizer": "bytes", "holdout": "0.3", "block_size": "9", "steps": "8", "batch_size": "6",
    "lr": "0.01", "sft_steps": "0", "sft_lr": "0.02", "log_every": "3", "n_layer": "2",
    "n_head": "4", "n_embd": "64", "dtype": "bfloat16", "seed": "5", "temperature": "0.5",
}


def kinds_of_run():
    """{the argv of a kind of run: names of the flags that do nothing for it}"""
    useless = {}
    for line in DOES_NOTHING.strip("\n").splitlines():
        kind, names = line.split("->")
        useless.setdefault(kind.strip(), []).extend(names.split())
    return useless


USELESS = [(kind, name) for kind, names in kinds_of_run().items() for name in names]


@cases("kind, name", USELESS)
def test_a_flag_that_does_nothing_is_refused_by_name(kind, name):
    value = VALUES.get(name, "x")
    value = [] if name in ("resume", "overwrite") else [value]
    refused(f"--{name} does nothing here (", *kind.split(), f"--{name}", *value)


USEFUL = [(kind, name) for kind in kinds_of_run() for name in VALUES
          if (kind, name) not in USELESS and kind != "--resume"]


@cases("kind, name", USEFUL)
def test_a_flag_that_does_something_is_taken(kind, name):
    args = options(*kind.split(), f"--{name}", VALUES[name])
    assert str(getattr(args, name)) == VALUES[name]


def test_a_flag_that_is_repeated_counts_once():
    """The last one."""
    assert options("--tau", 1, "--tau", 2).tau == 2


def test_defaults_differ_for_a_file():
    world, file = options(), options("--data", "x")
    assert [world.tau, world.steps, world.batch_size] == [0.2, 2200, 256]
    assert [file.tau, file.steps, file.batch_size] == [0.1, 200, 16]


def test_weights_of_another_run_get_no_sft_by_default():
    assert options("--init_from", "x").sft_steps == 0
    assert options("--data", "x", "--init_from", "y").sft_steps == 0


BAD_COMMANDS = """
--tau 0                  -> --tau is '0'; it takes
--tau -1                 -> --tau is '-1'; it takes
--tau nan                -> --tau is 'nan'; it takes
--tau inf                -> --tau is 'inf'; it takes
--tau x                  -> --tau is 'x'; it takes
--tau ''                 -> --tau is ''; it takes
--tau none               -> --tau is 'none'; it takes
--tau -                  -> --tau is '-'; it takes
--tau                    -> argument --tau: expected one argument
--tau 1 2                -> unrecognized arguments: 2; --help lists the flags
--tau=--                 -> --tau is '[]'; it takes 0.01..1e9
--lr 0                   -> --lr is '0'; it takes
--lr nan                 -> --lr is 'nan'; it takes
--sft_lr nan             -> --sft_lr is 'nan'; it takes
--steps 0                -> --steps is '0'; it takes
--steps 1.5              -> --steps is '1.5'; it takes
--steps 1e3              -> --steps is '1e3'; it takes
--steps none             -> --steps is 'none'; it takes
--sft_steps -1           -> --sft_steps is '-1'; it takes
--batch_size 0           -> --batch_size is '0'; it takes
--batch_size 1000000000  -> --batch_size is '1000000000'; it takes
--pairs 0                -> --pairs is '0'; it takes
--pairs 1000000000       -> --pairs is '1000000000'; it takes
--n_embd 100000000       -> --n_embd is '100000000'; it takes
--n_layer 0              -> --n_layer is '0'; it takes
--seed -1                -> --seed is '-1'; it takes
--seed 1.5               -> --seed is '1.5'; it takes
--log_every 0            -> --log_every is '0'; it takes
--loss kto               -> --loss is 'kto'; it takes ipo
--loss ''                -> --loss is ''; it takes
--loss none              -> --loss is 'none'; it takes
--labels maybe           -> --labels is 'maybe'; it takes hard
--mu x                   -> --mu is 'x'; it takes uniform
--dtype float16          -> --dtype is 'float16'; it takes float32
--device tpu             -> --device is 'tpu'; it takes cpu
--device ''              -> --device is ''; it takes
--resume x               -> --resume is 'x'; it takes yes
--overwrite x            -> --overwrite is 'x'; it takes yes
--out ''                 -> --out is ''; it takes
--data ''                -> --data is ''; it takes
--sample ''              -> --sample is ''; it takes
--init_from ''           -> --init_from is ''; it takes
--noise 0.2              -> unrecognized arguments: --noise 0.2
--logp mean              -> unrecognized arguments: --logp mean
--nonsense               -> unrecognized arguments: --nonsense
--sample_ x              -> unrecognized arguments: --sample_ x
--batch 4                -> unrecognized arguments: --batch 4
extra                    -> unrecognized arguments: extra
--n_embd 30 --n_head 4   -> --n_embd 30 is no multiple of --n_head 4; change one
--sample x --temperature -1           -> --temperature is '-1'; it takes
--sample x --temperature nan          -> --temperature is 'nan'; it takes
--data good.jsonl --holdout -0.1      -> --holdout is '-0.1'; it takes
--data good.jsonl --holdout 1         -> --holdout is '1'; it takes
--data good.jsonl --block_size 0      -> --block_size is '0'; it takes
--data good.jsonl --tokenizer ''      -> --tokenizer is ''; it takes
--data good.jsonl --tokenizer x       -> --tokenizer x: unknown, or neither on disk nor
--data good.jsonl --tokenizer words   -> the world has no word
--data no.jsonl --tokenizer bytes     -> --data no.jsonl: no such file; give a JSONL file
--data BT --tokenizer bytes           -> --data BT: no such file; give a JSONL file (python ipo.py takes bt,
--data . --tokenizer bytes            -> --data .: a folder; give a JSONL file
--data empty.jsonl --tokenizer bytes  -> --data empty.jsonl: the file is empty
--data same.jsonl --tokenizer bytes   -> every pair was dropped
--data bad.jsonl --tokenizer bytes    -> bad.jsonl:2: 'p' is 7
--data table.csv --tokenizer bytes    -> table, perhaps), not JSONL; python -m lab.models.jsonl
--init_from no.pt        -> no.pt: not what a run saved ([Errno 2] No such file
--init_from cut.pt       -> cut.pt: not what a run saved
--init_from bad.jsonl    -> --init_from bad.jsonl:
--init_from bytes.pt     -> knows the tokens of bytes, and --data bt has those of words
--sample x               -> out/ckpt.pt: not what a run saved ([Errno 2] No such file
--sample x --out cut.pt  -> cut.pt/ckpt.pt: not what a run saved ([Errno 20] Not a directory
--sample x --init_from cut.pt         -> cut.pt: not what a run saved
--out good.jsonl         -> File exists: 'good.jsonl'
--resume                 -> out/ref.pt: not what a run saved
"""


@pytest.fixture(scope="module")
def folder_of_bad_things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write(folder / "good.jsonl", pair())
    write(folder / "bad.jsonl", pair(), pair(p=7))
    write(folder / "same.jsonl", pair("a", "a"))
    write(folder / "empty.jsonl")
    write(folder / "table.csv", "prompt,chosen,rejected", "q,a,b")
    whole_file = saved(folder / "bytes.pt")
    (folder / "cut.pt").write_bytes(whole_file[:3000])
    return folder


@cases("line", BAD_COMMANDS.strip().splitlines())
def test_bad_input_is_one_line_and_status_two(folder_of_bad_things, monkeypatch, line):
    """No traceback, nothing written."""
    monkeypatch.chdir(folder_of_bad_things)
    before = contents(".")
    command, message = line.split(" -> ")
    refused(message.strip(), *shlex.split(command))
    assert contents(".") == before


def test_a_long_value_is_cut_in_its_complaint():
    with pytest.raises(data.Refused) as error:
        ipo.parse(["--tau", LONG])
    assert "z" * 80 in str(error.value)
    assert "z" * 81 not in str(error.value)


def test_a_hostile_value_reaches_the_screen_as_printable_text():
    with pytest.raises(data.Refused) as error:
        ipo.parse(["--tau", RED + "\n"])
    assert str(error.value).isprintable()


def test_the_program_ends_with_its_status(monkeypatch, capsys):
    """`python ipo.py --tau 0`, in this process."""
    monkeypatch.setattr(sys, "argv", ["ipo.py", "--tau", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "ipo.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert err.startswith("ipo.py: --tau is '0'")
    assert err.count("\n") == 1
    assert out == ""


def test_help_explains_every_flag(capsys):
    """The table, of at most 32."""
    with pytest.raises(SystemExit) as end:
        ipo.main(["--help"])
    said = capsys.readouterr().out
    assert not end.value.code
    names = vars(options())
    assert len(names) <= 32
    for name in names:
        assert re.search(rf"^{name} +\S+ +\S+ +\S+ +\S+ +\S+ +\S+ +\S+ ", said, re.M), name


# -------------------------------------------------------------------- a device, pretended where there is none

FAKE = torch.device("xpu")  # torch knows the name; most machines lack the thing


def tensors_in(value):
    """The tensors in a value, or in nested lists, tuples and dicts."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    found = []
    if isinstance(value, (list, tuple)):
        for part in value:
            found += tensors_in(part)
    return found


def on_fake(tensor):
    return getattr(tensor, "on_fake", False)


def mark(value, there=True):
    for tensor in tensors_in(value):
        tensor.on_fake = there


def moved(tensor, *wanted):
    """tensor.to(device or dtype or both)"""
    devices = [torch.device(value) for value in wanted if isinstance(value, (str, torch.device))]
    dtypes = [value for value in wanted if isinstance(value, torch.dtype)]
    there = FAKE in devices if devices else on_fake(tensor)
    result = tensor.to(*dtypes) if dtypes else tensor
    if there != on_fake(tensor):
        result = result.clone()
    mark(result, there)
    return result


def refuse_a_mix(name, args, inputs):
    """Raises RuntimeError if a tensor of the CPU meets one of FAKE where a real device would not have it.

    It may if it is a single number, an index of a tensor on FAKE, or copied.
    """
    if name in ("copy_", "__set__", "_has_compatible_shallow_copy_type"):
        return
    if name in ("__getitem__", "__setitem__") and on_fake(args[0]):
        by_slices = not tensors_in(args[1])
        inputs = [] if by_slices else tensors_in(args[2:])
    for tensor in inputs:
        if not on_fake(tensor) and tensor.dim() > 0:
            raise RuntimeError(f"{name}: tensors on two devices")


class Accelerator(TorchFunctionMode):
    """Within this context tensors may be moved to FAKE, or made there, and say that they are there.

    All work is done on the CPU. An operation on tensors of both devices is an error.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.__name__
        if name == "to":
            return moved(*args, *kwargs.values())
        if name == "cpu":
            return moved(args[0], "cpu")
        inputs = tensors_in(args) + tensors_in(kwargs)
        there = any(map(on_fake, inputs))
        if there:
            refuse_a_mix(name, args, inputs)
            assert kwargs.get("generator") is None, "a CPU's generator"
        if function == torch.Tensor.device.__get__ and there:
            return FAKE
        if kwargs.get("device") == FAKE:
            there, kwargs["device"] = True, "cpu"
        result = function(*args, **kwargs)
        if there:
            mark(result)
        if function == torch.Tensor.data.__set__:
            mark(args[0], on_fake(args[1]))
        return result


def test_the_pretended_device_refuses_a_mix():
    """As a real one does."""
    with Accelerator():
        there = torch.arange(3).to(FAKE)
        made_there = torch.zeros(3, device=FAKE)
        assert there.device == FAKE
        assert (there + made_there).device == FAKE
        for mix in (lambda: there + torch.arange(3), lambda: torch.arange(3)[there]):
            with pytest.raises(RuntimeError, match="two devices"):
                mix()


def test_the_pretended_device_takes_what_a_real_one_takes():
    """Single numbers, indices from the CPU, copies; what comes back is on the CPU."""
    with Accelerator():
        there = torch.arange(3).to(FAKE)
        there += torch.tensor(1)
        there[:2] = torch.tensor([7, 8])
        assert there[torch.tensor([1])].item() == 8
        assert (there.cpu() + torch.arange(3)).device.type == "cpu"


def on_accelerator(argv, policy=None):
    """A run with --device FAKE."""
    args = options(*argv)
    args.device = str(FAKE)
    with Accelerator():
        ipo.run(args, policy)


def test_a_run_on_a_device_is_the_run_on_the_cpu(small_world, whole, tmp_path):
    """No tensor is left behind in SFT, scoring, the start check, the loop, evaluation, saving."""
    flags, folder = whole
    on_accelerator([*flags, "--out", tmp_path])
    assert outcome(tmp_path) == outcome(folder)
    assert report(tmp_path)["flags"]["device"] == "xpu"


def test_a_policy_is_moved_to_the_device(tmp_path):
    policy = byte_gpt()
    on_accelerator(["--data", some_pairs(tmp_path), *FILE, "--out", tmp_path], policy)
    for p in policy.parameters():
        assert on_fake(p)


def test_a_run_on_a_device_is_resumed_there(small_world, whole, tmp_path):
    flags, folder = whole
    with stopped(ipo, "optimizer_step", 10), pytest.raises(SystemExit):
        on_accelerator([*flags, "--out", tmp_path])
    on_accelerator(["--resume", "--out", tmp_path])
    assert outcome(tmp_path) == outcome(folder)


def test_a_policy_on_a_device_is_asked_there(tmp_path):
    saved(tmp_path / "a.pt")
    args = options("--init_from", tmp_path / "a.pt", "--sample", "\1\2")
    args.device = str(FAKE)
    with mock.patch.object(model.GPT, "to") as move:
        ipo.sample(args)
    assert move.call_args.args == ("xpu",)


def test_an_answer_of_a_policy_on_a_device_is_that_on_the_cpu():
    policy = speaker()
    expected = model.generate(policy, ABCD, "b c")
    with Accelerator():
        policy.to(FAKE)
        assert model.generate(policy, ABCD, "b c") == expected


def test_log_probs_of_a_policy_on_a_device_come_back():
    """Of short rows and of long ones, for which prefixes are shared."""
    for n in (6, 40):
        tokens = torch.randint(257, (4, n), generator=seeded())
        with Accelerator():
            logp = ipo.sequence_logp(byte_gpt().to(FAKE), tokens, tokens > 100)
        assert not on_fake(logp)
        assert torch.equal(logp, ipo.sequence_logp(byte_gpt(), tokens, tokens > 100))


# ---------------------------------------------------------------- what a user's code adds, the core unchanged

def test_the_command_line_may_be_called(small_world, tmp_path):
    status = ipo.main([*WORLD, "--device", "cpu", "--out", str(tmp_path)])
    assert status == 0
    assert report(tmp_path)["after"]["h"] > 0


def test_importing_says_and_changes_nothing(monkeypatch, capsys):
    """No line on the screen, no switch of torch."""
    for name in ("ipo", "data", "model"):
        monkeypatch.delitem(sys.modules, name)
    torch.set_num_threads(3)
    importlib.import_module("ipo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 3
    assert capsys.readouterr().out == ""


def my_loss(h, p, tau):
    return (h - torch.logit(p) / tau) ** 2


MINE = [*WORLD, "--loss", "ipo", "--labels", "soft"]


def run_mine(folder):
    """A run with another loss, by its name in LOSSES."""
    args = options(*MINE, "--out", folder)
    args.loss = "mine"
    ipo.run(args)
    return report(folder)


def test_a_loss_of_ones_own_is_trained(small_world, tmp_path):
    """Its optimum is unknown."""
    ipo.LOSSES["mine"] = my_loss
    ours = run_mine(tmp_path)
    assert ours["after"]["loss"] < ours["ref"]["loss"]
    assert "opt" not in ours
    assert "kl_opt" not in ours["after"]


def test_a_loss_of_ones_own_is_measured_with_its_psi(small_world, tmp_path):
    ipo.LOSSES["mine"] = my_loss
    ipo.PSI_OF["mine"] = torch.logit
    ours = run_mine(tmp_path)
    assert ours["after"]["kl_opt"] < ours["ref"]["kl_opt"]


class HuggingFace(torch.nn.Module):
    """A model of transformers as the policy, for the tokens of --tokenizer bytes."""

    def __init__(self, std=0.2):
        super().__init__()
        theirs = hugging_face(std, vocab_size=257)
        self.theirs, self.head = theirs.transformer, theirs.lm_head
        self.config = Namespace(block_size=64, vocab_size=257)

    def hidden(self, tokens):
        return self.theirs(tokens).last_hidden_state


def test_a_model_of_ones_own_trains_and_resumes_bit_for_bit(tmp_path):
    """transformers' GPT-2, stopped in its third step after SFT."""
    flags = "--data", some_pairs(tmp_path), *FILE, "--block_size", 64, "--out"
    whole_run, cut_run = tmp_path / "whole", tmp_path / "cut"
    ipo.run(options(*flags, whole_run), HuggingFace())
    with stopped(ipo, "optimizer_step", 6), pytest.raises(SystemExit):
        ipo.run(options(*flags, cut_run), HuggingFace())
    ipo.run(options("--resume", "--out", cut_run), HuggingFace(1.0))
    assert outcome(cut_run) == outcome(whole_run)


def test_pairs_of_ones_own_are_a_source(tmp_path):
    args = options("--data", "sums", *FILE, "--out", tmp_path)
    pairs = [data.Pair(f"{i} + {i} =", f" {2 * i}", f" {2 * i + 1}") for i in range(20)]
    ipo.run(args, source=ipo.FileSource(args, pairs=pairs))
    assert report(tmp_path)["after"]["h"] > 0


def test_pairs_of_ones_own_have_a_tokenizer_of_ones_own(tmp_path):
    args = options("--data", "letters", *FILE, "--out", tmp_path)
    pairs = [data.Pair("a", "b c", "c b"), data.Pair("b", "d", "a")]
    source = ipo.FileSource(args, ABCD, pairs)
    assert source.sizes == (256, ABCD.n_vocab, ABCD.n_vocab)


def online(policy, source, steps):
    """Batches of pairs that the policy, as it is now, says."""
    for step in range(steps):
        source.draw(64, source.table(policy).exp(), "hard", seeded(step))
        yield source.pairs.batch(torch.arange(64))


def test_the_loop_takes_pairs_that_are_made_online(small_world, tmp_path):
    """It goes uphill."""
    source, policy = posed("--steps", 50, "--log_every", 25, "--out", tmp_path)
    ipo.train(policy, online(policy, source, 50), source.args, source.evaluate)
    before, after = source.exact["ref"].exp(), source.table(policy).exp()
    worth = data.mean_over_opponents(source.pstar, source.mu)
    assert (after * worth).sum() > (before * worth).sum() + 0.1


def test_a_world_may_be_enumerated_without_a_run():
    """pi* of a reference of one's own."""
    world = data.World("cyclic")
    ref = world.base.log().clamp(min=-20).expand(4, 400)
    mu = torch.full((4, 400), 1 / 400).double()
    best = data.optimum(ref, world.pstar, mu, 0.5)
    assert data.kl(best, ref) > 0.03


# -------------------------------------------------------------------------------------------------- the house

CORE = ["ipo.py", "data.py", "model.py"]
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
           tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@functools.cache
def source_of(name):
    return (HERE / name).read_text(encoding="utf-8")


def without_answers(text):
    """A file without what stands between the banners of an exercise, which is a student's."""
    return re.sub("# =+ EXERCISE.*?# =+ END", "# END", text, flags=re.S)


def docstring_lines(text):
    """The numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(ast.parse(text)):
        text_alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text_alone and isinstance(node.value.value, str):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def tokens_by_line(text):
    """{number of a line of code: its tokens}, without comments and docstrings."""
    counts, docs = {}, docstring_lines(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type not in NO_CODE and line not in docs:
            counts[line] = counts.get(line, 0) + 1
    return counts


@functools.cache
def code_of(name):
    return tokens_by_line(without_answers(source_of(name)))


@cases("name, most", [("ipo.py", 3200), ("data.py", 2600), ("model.py", 2100)])
def test_a_file_of_the_core_is_short(name, most):
    """Tokens of Python."""
    assert sum(code_of(name).values()) <= most


def test_ipo_has_at_most_300_lines_of_code():
    assert len(code_of("ipo.py")) <= 300


@cases("name, mean, most", [
    ("ipo.py", 11, 25),
    ("data.py", 11, 25),
    ("model.py", 11, 25),
    ("test_ipo.py", 11.5, 30),
])
def test_a_line_is_a_step(name, mean, most):
    """Tokens in a line, on average and at most."""
    counts = code_of(name)
    too_long = [line for line, n in counts.items() if n > most and "add_argument(" not in source_of(name)]
    assert sum(counts.values()) / len(counts) <= mean
    assert not too_long


@cases("name", [*CORE, "test_ipo.py"])
def test_a_line_fits_the_screen(name):
    wide = [line for line in source_of(name).splitlines() if len(line) > 110]
    assert not wide


@cases("name", [*CORE, "test_ipo.py"])
def test_a_function_has_at_most_30_lines_of_code(name):
    text = without_answers(source_of(name))
    code = tokens_by_line(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            inside = [line for line in code if node.lineno <= line <= node.end_lineno]
            assert len(inside) <= 30, node.name


def imports_of(name):
    """The names of the modules that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(source_of(name))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return {module.split(".")[0] for module in modules}


@cases("name", CORE)
def test_the_core_knows_no_lab(name):
    assert "lab" not in imports_of(name)


def test_the_files_of_the_core_stand_on_each_other_in_one_order():
    assert not imports_of("data.py") & {"ipo", "model"}
    assert "ipo" not in imports_of("model.py")


# -------------------------------------------------------------------------------------------------- README.md

README = source_of("README.md")
PROSE = re.sub("^```.*?^```", "", README, flags=re.S | re.M)


def blocks(kind):
    """Lines of the README's fenced blocks of a kind."""
    found = re.findall(rf"^```{kind}\n(.*?)^```", README, re.S | re.M)
    return "".join(found).splitlines()


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_288


def test_the_readme_quotes_the_code_letter_for_letter():
    """Every line of its Python blocks; psi may be edited."""
    lines = {"", "...", "return q"}
    for name in CORE:
        lines |= {line.strip() for line in source_of(name).splitlines()}
    quoted = {line.strip() for line in blocks("python")}
    assert quoted
    assert not quoted - lines


def links():
    """What the README's links lead to in this folder; lab/ is not the core's business."""
    targets = re.findall(r"\]\(([^)#]+)", PROSE)
    return [target for target in targets if not target.startswith(("http", "lab/"))]


@cases("target", links())
def test_what_the_readme_links_to_exists(target):
    assert (HERE / target).exists()


PAGES = [HERE / "README.md", *sorted(HERE.glob("lab/*.md"))]


@cases("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page):
    """Here, or in the lab."""
    files = [HERE / "test_ipo.py", *HERE.glob("lab/**/test_*.py")]
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    for name in re.findall(r"\btest_\w+\b(?!\.py)", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in tests, name


def test_the_functions_in_the_readmes_reading_order_exist():
    """Names with an underscore in the rows of its tables."""
    rows = "".join(re.findall(r"^\|.*$", PROSE, re.M))
    core = "".join(source_of(name) for name in CORE)
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", rows):
        assert f"def {name}(" in core, name


def test_the_pairs_of_the_readme_are_read(tmp_path):
    pairs, _ = read(tmp_path, *blocks("json"))
    assert pairs


NUMBER = r"[-+]?\d+\.?\d*"


def measured_lines():
    """The lines of the block that stands for the output of the first command."""
    command = "<!-- measured: python ipo.py --loss ipo -->"
    block = re.search(rf"{command}\s*```\w*\n(.*?)```", README, re.S)[1]
    return [line for line in block.splitlines() if re.search(NUMBER, line)]


def numbers_like(line, printed):
    """The numbers of the lines printed that have this line's words; `...` stands for what is left out."""
    words = [re.escape(word) for word in re.sub(NUMBER, "#", line).split()]
    pattern = r"\s*".join(words).replace(r"\#", f"({NUMBER})")
    pattern = pattern.replace(re.escape("..."), ".*?")
    matches = [re.match(r"\s*" + pattern, line) for line in printed.splitlines()]
    return [list(map(float, match.groups())) for match in matches if match]


@cases("line", measured_lines())
def test_the_first_command_prints_what_the_readme_says(default_run, line):
    """Every number within 3 %, or .003."""
    said = [float(number) for number in re.findall(NUMBER, line)]
    for printed in numbers_like(line, default_run[1]):
        if printed == approx(said, rel=0.03, abs=3e-3):
            return
    pytest.fail(f"not printed: {line}")


def commands():
    """The words of each command in the README's shell blocks."""
    parts = []
    for line in blocks("sh"):
        parts += line.split("&&")
    return [shlex.split(part, comments=True) for part in parts]


def runs_of_ipo():
    """What follows `python ipo.py` in them."""
    return [words[2:] for words in commands() if words[:2] == ["python", "ipo.py"]]


def test_the_readme_says_how_to_run_and_test():
    assert len(runs_of_ipo()) >= 3
    assert ["pytest", "-q"] in commands()


def shortened(words):
    """The same command on other pairs, with few steps."""
    words = ["pairs.jsonl" if word.endswith(".jsonl") else word for word in words]
    if "--sample" in words or "--resume" in words:
        return words
    return [*words, *(FILE if "pairs.jsonl" in words else WORLD)]


def test_the_commands_of_the_readme_run(small_world, tmp_path, monkeypatch):
    """In their order. Those with gpt2, which needs a network, are parsed."""
    monkeypatch.chdir(tmp_path)
    some_pairs(tmp_path)
    for words in runs_of_ipo():
        if "gpt2" in words:
            ipo.parse(words)
        else:
            cli(*shortened(words))
