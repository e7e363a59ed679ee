"""Claims about nanoIPO, each with its proof or oracle. `pytest -q test_ipo.py`: under a minute.

Oracles: enumeration of all responses, closed forms, independent numpy, brute force, Hugging Face's GPT-2.
All tests run with the paper's Psi(q) = q, or one of their own, whatever a student made of `psi` in ipo.py.
"""
import ast, contextlib, copy, io, itertools, json, math, os, re, shlex, subprocess, sys, tokenize
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from pytest import approx

import data, ipo, model

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test goes online
torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
SHORT = "--steps 20 --pairs 2000 --sft_steps 5 --batch_size 32 --log_every 10".split()
SMALL = "--tokenizer bytes --steps 6 --sft_steps 3 --batch_size 4 --n_layer 1 --n_embd 16".split()
cases = pytest.mark.parametrize


def identity(q):
    return q


def tanh(q):
    return torch.tanh(8 * (q - 0.5))


@pytest.fixture(autouse=True)
def paper_psi(monkeypatch):
    """The paper's Psi; tables that a test extends are afterwards as they were."""
    monkeypatch.setattr(ipo, "psi", identity)
    for module, table in ((ipo, "LOSSES"), (ipo, "WORTH"), (data, "WORLDS")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))


def gpt(seed=0, **sizes):
    """A GPT with weights so large that no two tokens are equally likely."""
    torch.manual_seed(seed)
    small = {"block_size": 6, "vocab_size": 5, "n_layer": 2, "n_head": 2, "n_embd": 16}
    policy = model.GPT(model.GPTConfig(**(small | sizes)))
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return policy


def options(*argv):
    return ipo.parse(["--device", "cpu", *map(str, argv)])


def cli(*argv, status=0, says=""):
    """The command line, in this process, ends with this status -> what it prints. If it fails, one line on
    stderr says so."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = ipo.main(["--device", "cpu", *map(str, argv)])
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert ended == status and err.startswith("ipo.py: " * bool(status)) and says in err, (argv, says, err)
    assert err.count("\n") == bool(status), err
    return out


def refused(status, message, *argv):
    cli(*argv, status=status, says=message)


def report(folder):
    return Namespace(**json.loads(Path(folder, "report.json").read_text()))


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- target and losses

@cases("psi, targets", [
    (identity, (-5, 0, 1, 2.5, 4, 4.9, 5)), (tanh, (-9.99, 0, 6.64, 9.64, 9.97, 9.99, 9.99)),
    (torch.logit, (-math.inf, 0, 4.05, 10.99, 21.97, 45.95, math.inf))])
def test_target_of_each_psi(psi, targets):
    """(Psi(p) - Psi(1-p)) / 0.2 by hand; logit asks a certain pair for infinity: DPO's over-fitting."""
    ipo.psi = psi
    assert ipo.target(f64([0, 0.5, 0.6, 0.75, 0.9, 0.99, 1]), 0.1).tolist() == approx(targets, abs=8e-3)


def test_a_coin_flip_has_the_same_gradient_as_its_probability():
    """E_I (h - target(I))^2 and (h - target(p))^2 differ by a constant; so do 1/tau and 0 from 1/(2 tau)."""
    h = torch.linspace(-9, 9, 7, dtype=torch.float64)
    certain, lost, soft = (ipo.ipo_loss(h, f64(q), 0.1) for q in (1, 0, 0.8))
    assert (0.8 * certain + 0.2 * lost - soft).std() < 1e-9
    assert torch.allclose(((h - 1 / 0.1) ** 2 + h**2) / 2 - certain, f64(1 / (4 * 0.1**2)))


@cases("name, h, p, tau, slope", [
    ("ipo", 0, 1, 0.1, -10), ("ipo", 100, 1, 0.1, 190), ("ipo", 3, 0.3, 1, 6.4), ("dpo", 0, 1, 0.1, -0.05),
    ("dpo", 100, 1, 0.1, -4.5398e-6), ("dpo", 3, 0.3, 1, 0.652574), ("dpo", 0, 0, 2, 1)])
def test_gradient_of_each_loss(name, h, p, tau, slope):
    """2 (h - target) and -tau (p - s(tau h)), by hand: at h = 100 IPO pulls back, DPO never does at p = 1."""
    x = f64([h]).requires_grad_()
    ipo.LOSSES[name](x, f64([p]), tau).sum().backward()
    assert x.grad.item() == approx(slope, rel=1e-5)


def test_losses_against_numpy():
    """An implementation that shares nothing with ours."""
    h, p, tau = np.linspace(-9, 9, 50), np.random.default_rng(0).random(50), 0.3
    ours = {name: loss(f64(h), f64(p), tau).numpy() for name, loss in ipo.LOSSES.items()}
    assert np.allclose(ours["ipo"], (h - (2 * p - 1) / (2 * tau)) ** 2)
    assert np.allclose(ours["dpo"], p * np.logaddexp(0, -tau * h) + (1 - p) * np.logaddexp(0, tau * h))


@cases("reduce, values", [(sum, [11.56, 0.616344]), (np.mean, [19.8025, 0.6660253])])
def test_the_parity_fixture(reduce, values):
    """What tools are compared on: token log-ratios of one pair, tau 0.1. The sum is the paper's."""
    h = ipo.margin(f64([reduce([0.5, 0.25, 0.25, 0]), reduce([-0.2, -0.4])]), torch.zeros(2))
    assert [loss(h, torch.ones(1), 0.1).item() for loss in (ipo.ipo_loss, ipo.dpo_loss)] == approx(values)


def test_margin_is_chosen_minus_rejected_and_needs_the_reference():
    """h = log pi(yw)/ref(yw) - log pi(yl)/ref(yl), chosen rows first."""
    logp, ref_logp = torch.tensor([1.0, 2, 3, 5]), torch.tensor([0.5, 0, 0.25, 0])
    assert ipo.margin(logp, ref_logp).tolist() == [(1 - 0.5) - (3 - 0.25), 2 - 5]


# ---------------------------------------------------------------------------------------- common misreadings

def test_the_scaled_square_is_another_loss():
    """(beta h - 1/(2 beta))^2 asks for 1/(2 beta^2) = 50 nats at 0.1, ten times eq. 17's."""
    h, tau = torch.linspace(0, 100, 10_001, dtype=torch.float64), 0.1
    assert h[((tau * h - 1 / (2 * tau)) ** 2).argmin()] == approx(50)
    assert h[ipo.ipo_loss(h, torch.ones(1), tau).argmin()] == approx(5)


@cases("name, psi", [("ipo", identity), ("dpo", torch.logit)])
@cases("p", [0.3, 0.6, 0.9])
def test_population_link_of_each_loss(name, psi, p):
    """argmin_h p f(h) + (1-p) f(-h), on a grid: p - 1/2 (IPO), logit p (DPO). Psi is this map, not f."""
    h, loss, q = torch.linspace(-12, 12, 24_001, dtype=torch.float64), ipo.LOSSES[name], f64(p)
    expected = p * loss(h, torch.ones(1), 1.0) + (1 - p) * loss(-h, torch.ones(1), 1.0)
    assert h[expected.argmin()].item() == approx((psi(q) - psi(1 - q)).item() / 2, abs=1e-3)
    assert ipo.WORTH[name](q) == psi(q)


def policy_of(p, mu, ref, tau, psi=identity):
    """eq. 7 for one prompt, as probabilities."""
    return data.optimum(f64(ref).log()[None], psi(f64(p))[None], f64(mu)[None], tau)[0].exp()


@cases("ref, probability", [([0.9, 0.1], 0.155), ([0.5, 0.5], 0.622)])
def test_without_a_reference_the_answer_is_another(ref, probability):
    """y2 preferred, tau = 1: pi*(y2) = sigmoid(log(ref2/ref1) + 1/2)."""
    assert policy_of([[0.5, 0], [1, 0.5]], [0.5, 0.5], ref, 1.0)[1].item() == approx(probability, abs=5e-4)


def slope(loss, policy):
    """Of loss(log-probs), largest in the logits of a policy that is given by its probabilities."""
    theta = f64(policy).log().requires_grad_()
    return torch.autograd.grad(loss(theta.log_softmax(0)), theta)[0].abs().max().item()


@cases("length, of_sum, stationary", [((1, 2, 4), 0, True), ((1, 2, 4), 1, False), ((1, 1, 1), 1, True)])
def test_the_mean_form_has_another_optimum(length, of_sum, stationary):
    """Its slope is 0 at ref exp(|y| g/tau), g = E_mu p*, not at the sum's pi* = ref exp(g/tau)."""
    p, mu = f64([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]]), f64([0.5, 0.3, 0.2])
    power, pi = 1 if of_sum else f64(length), f64([0.2, 0.5, 0.3])
    log_ref = pi.log() - power * (p * mu).sum(-1) / 0.5  # so that pi is the policy in question

    def loss(logp):
        f = (logp - log_ref) / f64(length)
        return (mu[:, None] * mu * ipo.ipo_loss(f[:, None] - f, p, 0.5)).sum()

    assert (slope(loss, [0.2, 0.5, 0.3]) < 1e-9) == stationary


def test_tau_pulls_to_the_reference_whatever_its_entropy():
    """Towards a peaked reference the entropy of pi* falls as tau rises: no exploration."""
    p, mu, ref = [[0.5, 0.1, 0.1], [0.9, 0.5, 0.5], [0.9, 0.5, 0.5]], [1 / 3] * 3, [0.98, 0.01, 0.01]
    entropy = [torch.special.entr(policy_of(p, mu, ref, tau)).sum().item() for tau in (0.1, 0.3, 1, 10)]
    assert entropy == sorted(entropy, reverse=True) and entropy[0] > 2 * entropy[-1]


@cases("pairs, best, limit", [
    ("ab bc ac", (0.964370, 0.034403, 0.001227), (1, 1e-90, 1e-180)), ("ab ba", [1 / 3] * 3, [1 / 3] * 3),
    ("ab bc ca", [1 / 3] * 3, [1 / 3] * 3), ("ac bc", (0.498321, 0.498321, 0.003358), (0.5, 0.5, 1e-90))])
def test_dpo_tends_to_a_limit_on_certain_pairs(pairs, best, limit):
    """The paper's bandits, tau 0.1: IPO's slope is 0 at pi*, DPO's at certainty only; they meet in cycles."""
    chosen, rejected = (["abc".index(pair[k]) for pair in pairs.split()] for k in (0, 1))

    def at(loss, policy):
        return slope(lambda logp: loss(logp[chosen] - logp[rejected], torch.ones(1), 0.1).mean(), policy)

    assert at(ipo.ipo_loss, best) < 2e-3 and at(ipo.dpo_loss, limit) < 1e-6
    assert (at(ipo.dpo_loss, best) < 1e-6) == (limit == best)


def test_mu_matters_unless_psi_is_logit_under_bradley_terry():
    """logit p* = r - r': another mu adds a constant to g, which Z takes up; the identity has no such luck."""
    p, (ref, *_) = data.World("bt").pstar, random_policies()
    for psi, matters in ((torch.logit, False), (identity, True)):
        some, other = (data.optimum(ref, psi(p), mu, 0.1) for mu in ((8 * p.mean(-1)).softmax(-1), ref.exp()))
        assert (data.kl(some, other) > 0.01) == matters == (data.kl(some, other) > 1e-9)


# -------------------------------------------------------------------------------- the log-prob of a response

def test_sequence_logp_is_the_product_of_conditionals():
    """Brute force, token by token, with the plain forward pass; prompts of different lengths, padded rows."""
    tokens = torch.tensor([[1, 2, 3, 4, 0], [4, 3, 1, 0, 0], [2, 2, 2, 2, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    total, mean = (ipo.sequence_logp(gpt(), tokens, mask, mean).tolist() for mean in (False, True))
    for ids, m, of_all, of_one in zip(tokens, mask, total, mean):
        logp = [gpt()(ids[None, :t])[0, -1].log_softmax(-1)[ids[t]].item() for t in m.nonzero().flatten()]
        assert of_all == approx(sum(logp), abs=1e-5) and of_one == approx(np.mean(logp), abs=1e-5)


def test_probabilities_of_all_short_responses_sum_to_one():
    """Every string over {0..3} that ends with 4 (end of text) or is cut at three, 1 + 4 + 16 + 64: all
    that can happen."""
    ended = [(*r, 4) for k in range(3) for r in itertools.product(range(4), repeat=k)]
    rows = data.PairData(itertools.product([[2, 1]], [*ended, *itertools.product(range(4), repeat=3)]))
    assert ipo.sequence_logp(gpt(), *rows.padded(torch.arange(85))).exp().sum().item() == approx(1, abs=1e-5)


@cases("mask, words", [([[0, 0, 0]], "no response"), ([[1, 1, 0]], r"mask\[:,0\]"), ([[0, 1]], "in shape")])
def test_sequence_logp_refuses_a_wrong_mask(mask, words):
    """The three errors of a programmer."""
    with pytest.raises(AssertionError, match=words):
        ipo.sequence_logp(gpt(), torch.tensor([[1, 2, 3]]), torch.tensor(mask))


def plain_logp(policy, tokens, mask):
    """The plain pass over every position, in one piece."""
    logp = policy(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return (logp * mask[:, 1:]).sum(1)


def assert_plain(ours, policy, tokens, mask):
    """Log-probs, and gradients, of the plain pass."""
    theirs, weight = plain_logp(policy, tokens, mask), torch.arange(1.0, 1 + len(ours))
    assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((z * weight).mean(), policy.parameters()) for z in (ours, theirs)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*gradients))


def test_shared_prefixes_change_nothing():
    """Log-probs and gradients are the plain pass's; each prefix, counted by brute force, is computed once;
    few ask twice; a row may want nothing."""
    policy, t, computed = gpt(block_size=64, vocab_size=11).double(), torch.arange(60), []
    tokens, length = torch.randint(3, (6, 60)), torch.tensor([[60], [45], [57], [58], [20], [57]])
    tokens[3:, :40], tokens[5] = tokens[:3, :40], tokens[2]
    mask = (t < length) & (t >= torch.tensor([[3], [40], [2], [50], [3], [2]]))
    policy.transformer.ln_f.register_forward_hook(lambda layer, x, y: computed.append(len(y)))
    assert_plain(ipo.sequence_logp(policy, tokens, mask), policy, tokens, mask)
    prefixes = {tuple(row[:k].tolist()) for row, n in zip(tokens, length) for k in range(1, n)}
    asked = sum(own.numel() for _, own in model.Shared(tokens, t < length - 1).groups)
    assert computed[0] == len(prefixes) > 0.8 * asked
    assert torch.allclose(policy.hidden(tokens, mask & (length > 45))[0], policy.hidden(tokens)[0])


def test_logits_in_chunks_change_nothing():
    """512 tokens at a time: the same values and gradients as in one piece, and no (S,V) is kept."""
    policy, kept = gpt(block_size=16, vocab_size=301), []
    tokens, mask = torch.randint(301, (60, 12)), torch.arange(12).expand(60, 12) >= 1
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.shape[-1]) or z, lambda z: z):
        ours = ipo.sequence_logp(policy, tokens, mask)
    assert kept and 301 not in kept
    assert_plain(ours, policy, tokens, mask)


def test_gradients_of_shared_prefixes_do_not_stall_in_bfloat16():
    """One prefix in a thousand rows: a sum of a thousand ones, which in bfloat16 would stop at 256."""
    x, where = torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_(), torch.zeros(1000, dtype=torch.int64)
    assert torch.autograd.grad(model.spread(x, where).sum(), x)[0] == 1000


# ----------------------------------------------------------------------------------------------- the policy

def hugging_face(std=0.2, **sizes):
    """A random GPT-2 of transformers."""
    small = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 0}
    torch.manual_seed(0)
    transformers = model.quiet_transformers()
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(small | sizes), bos_token_id=0)).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=std)
    return hf


@cases("sizes", [{}, {"n_layer": 1, "n_head": 3, "n_embd": 48, "n_positions": 20}, {"vocab_size": 99}])
def test_gpt_is_gpt2(tmp_path, sizes):
    """transformers' weights in our GPT: same logits; saved from ours, the same model again."""
    theirs, tokens = hugging_face(**sizes), torch.arange(36).view(3, 12)
    theirs.save_pretrained(tmp_path / "in")
    ours = model.GPT.from_pretrained(tmp_path / "in")
    ours.save_pretrained(tmp_path / "out", eot_token=7)
    back = type(theirs).from_pretrained(tmp_path / "out")
    assert torch.allclose(ours(tokens), theirs(tokens).logits, rtol=0, atol=5e-6)
    assert torch.equal(back(tokens).logits, theirs(tokens).logits) and back.config.eos_token_id == 7


@cases("variant, words", [
    ({"activation_function": "relu"}, "variant"), ({"tie_word_embeddings": False}, "variant"), ("cut", "cut"),
    ({"scale_attn_by_inverse_layer_idx": True}, "variant"), ({"n_inner": 40}, "loading"), ("llama", "llama"),
    ("lacking", "weights are missing")])
def test_what_is_not_gpt2_is_refused_in_one_line(tmp_path, variant, words):
    """Another activation, head, scale, width, architecture; a file that is cut or lacks weights."""
    hf = hugging_face(0.5, **(variant if isinstance(variant, dict) else {}))
    state = {name: p for name, p in hf.state_dict().items() if variant != "lacking" or ".h.1." not in name}
    hf.save_pretrained(tmp_path / "cut", state_dict=state)
    if variant == "cut":
        os.truncate(tmp_path / "cut/model.safetensors", 500)
    if variant == "llama":
        model.quiet_transformers().LlamaConfig().save_pretrained(tmp_path / "cut")
    with pytest.raises(model.Refused, match=f"^--init_from [^\n]*{words}[^\n]*; name a run's .pt[^\n]*$"):
        model.GPT.from_pretrained(tmp_path / "cut")


def test_initial_weights_are_gpt2s():
    """Normal, std .02; what blocks add to the stream, 2 per block, by sqrt(2 n_layer) less; biases 0."""
    torch.manual_seed(0)
    for name, p in model.GPT(model.GPTConfig(64, 300, 0, n_layer=8, n_head=4, n_embd=64)).named_parameters():
        std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
        vector = p.dim() == 1 and (p == ("ln" in name and "weight" in name)).all()
        assert vector or p.std().item() == approx(std, rel=0.06), name


@cases("heat", [1.0, 2.0])
def test_generate_samples_the_model(heat):
    """Frequencies of one-token samples against the softmax; temperature 0, or almost, is the mode."""
    tokenizer, policy = data.get_tokenizer("words a b c d"), gpt(3, vocab_size=6, head_size=5)
    logits = policy(torch.tensor([[1, 2]]))[0, -1].detach()
    said = [model.generate(policy, tokenizer, [1, 2], heat, seed, 1) for seed in range(1000)]
    share = torch.tensor([said.count(text) for text in (" a", " b", " c", " d", "")]) / 1000  # "": the end
    assert (share - (logits / heat).softmax(-1)).abs().max() < 0.05
    modes = {model.generate(policy, tokenizer, [1, 2], cold, 0, 1) for cold in (0, 1e-300)}
    assert modes == {max(said, key=said.count)} and model.generate(policy, tokenizer, [], 0)[0] == " "


# ------------------------------------------------------------------------------------------- checkpoint files

def saved(path, **extra):
    """-> the bytes of a checkpoint of gpt()."""
    model.save(path, gpt(), **extra)
    return Path(path).read_bytes()


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_a_checkpoint_returns_what_was_saved_and_a_flipped_bit_is_never_used(tmp_path):
    """Of 300 single-bit flips each is refused in one line, or was in a byte that nothing reads."""
    path, rng = tmp_path / "a.pt", np.random.default_rng(0)
    whole, refusals = saved(path, tokenizer="bytes"), []
    assert model.load(path)[1] == {"tokenizer": "bytes"} and model.load(path)[0].config == gpt().config
    for place, bit in zip(rng.integers(len(whole), size=300), rng.integers(8, size=300)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        try:
            assert same(model.load(path)[0], gpt()), f"byte {place}, bit {bit} was used"
        except model.Refused as error:
            refusals.append(re.fullmatch(f"{path}: .* name the ckpt.pt .*", str(error)))
    assert len(refusals) > 150 and all(refusals) and os.listdir(tmp_path) == ["a.pt"]


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_foreign_file_is_refused_and_executes_nothing(tmp_path, monkeypatch):
    """Cut, empty, text, another's tensors, impossible sizes or values, a pickle that would run code."""
    monkeypatch.chdir(tmp_path)
    optimizer = ipo.adamw(gpt())
    whole = saved("a.pt", step=1, optimizer=optimizer.state_dict())
    good = torch.load("a.pt", weights_only=True)
    values = [{"config": good["config"] | wrong} for wrong in ({"n_head": 3}, {"n_layer": 1}, {"x": 1})]
    values += [{"step": []}, {"step": None}, {"optimizer": 3}, {"optimizer": {}}, {"model": Evil()}]
    for content in [whole[:3000], whole[:-1], b"", b"text", [1], {}] + [good | wrong for wrong in values]:
        Path("b.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, "b.pt")
        with pytest.raises(model.Refused, match="^b.pt: no whole checkpoint"):
            model.load("b.pt", None, optimizer)
    assert not Path("evil").exists()


# ------------------------------------------------------------------------------------------------ the worlds

def random_policies():
    """Three unrelated policies in a world of 4 prompts, as log-probs (4,400)."""
    return list(torch.randn(3, 4, 400, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1))


def preferred(name, x, a, b):
    """p*(a>b) for prompt x, from the words of two reviews."""
    words, (a, b) = list(data.VALENCE), (a.split(), b.split())
    gap = sum(data.VALENCE[word][x] for word in a) - sum(data.VALENCE[word][x] for word in b)
    if name == "deterministic":
        return 0.5 if abs(gap) < 1e-9 else float(gap > 0)
    if name == "cyclic" and a and b:
        gap += (0, 2, -2)[(words.index(a[0]) - words.index(b[0])) % 3]
    return 1 / (1 + math.exp(-gap))


@cases("name", ["bt", "deterministic", "cyclic"])
def test_worlds_are_what_they_say(name):
    """p* word by word; it and its mirror sum to 1; cyclic alone is intransitive; 400 different reviews."""
    p, texts, ones = data.World(name).pstar, data.World(name).responses, range(1, 8)
    assert len(set(texts)) == 400 and torch.allclose(p + p.transpose(1, 2), torch.ones_like(p))
    for x, a, b in np.random.default_rng(0).integers([4, 400, 400], size=(500, 3)):
        assert p[x, a, b].item() == approx(preferred(name, x, texts[a], texts[b]), abs=1e-9)
    cycles = [min(p[0, a, b], p[0, b, c], p[0, c, a]) > 0.5 for a, b, c in itertools.permutations(ones, 3)]
    assert any(cycles) == (name == "cyclic")


def test_the_world_is_closed():
    """Any model of these sizes gives the 400 responses probability one, and says nothing else.

    So does the base distribution, which ends after each word but the last with probability 1/4.
    """
    world = ipo.WorldSource(options())
    policy = gpt(**dict(zip(("block_size", "vocab_size", "head_size"), world.sizes)))
    said = {model.generate(policy, world.tokenizer, world.prompts[1], seed=seed) for seed in range(50)}
    assert world.enumerate(policy).exp().sum(-1).tolist() == approx([1] * 4, abs=1e-5)
    assert said <= set(world.responses) and len(said) > 10 and max(len(t.split()) for t in said) == 3
    length = torch.tensor([len(text.split()) for text in world.responses])
    assert torch.bincount(length, world.base).tolist() == approx([0, 1 / 4, 3 / 16, 9 / 16])


@cases("labels, noise", [("hard", 0.0), ("hard", 0.3), ("soft", 0.3)])
def test_pairs_are_drawn_as_described(labels, noise):
    """Never equals; responses from mu; labels agree with p* and its noise as often as said; winners first."""
    world, (_, _, mu), seed = data.World("bt"), random_policies(), torch.Generator().manual_seed(0)
    world.draw(200_001, mu.exp(), labels, noise, seed)
    x, p, both = world.pairs.prompt, world.pairs.p, torch.stack([world.pairs.chosen, world.pairs.rejected])
    a, b = both - 400 * x
    assert torch.equal(both // 400, torch.stack([x, x])) and not (a == b).any()
    assert (torch.bincount(x) - 50_000).abs().max() <= 1
    share = torch.bincount(torch.cat([a[x == 2], b[x == 2]]), minlength=400) / (x == 2).sum() / 2
    assert (share - mu[2].exp()).abs().max() < 2e-3
    said = world.pstar + noise * (1 - 2 * world.pstar)
    ordered = said[x, torch.minimum(a, b), torch.maximum(a, b)].mean().item()
    assert torch.equal(p, torch.ones_like(p) if labels == "hard" else said[x, a, b].float())
    assert labels == "soft" or (a < b).double().mean().item() == approx(ordered, abs=5e-3)


def test_pairs_cannot_be_drawn_from_a_reference_that_always_says_the_same():
    """Draws would be equal for ever."""
    with pytest.raises(data.Refused, match="always says the same"):
        data.World("bt").draw(10, torch.eye(400).double()[[7] * 4], "hard", 0.0, torch.Generator())


@cases("name", ["bt", "cyclic"])
@cases("psi", [identity, tanh, torch.logit, torch.square, torch.sqrt])
def test_the_gap_to_the_optimum_is_tau_times_the_kl(name, psi):
    """J(pi*) - J(pi) = tau KL(pi||pi*) for every pi and Psi: so eq. 7 is the maximum, and the only one."""
    p, (pi, ref, mu), tau = data.World(name).pstar, random_policies(), 0.3
    best = data.optimum(ref, psi(p), mu.exp(), tau)
    n, top = (data.exact(z, ref, {"opt": best}, p, mu.exp(), psi, tau) for z in (pi, best))
    assert top["objective"] - n["objective"] == approx(tau * n["kl_opt"], rel=1e-9)
    assert top["kl_opt"] == approx(0, abs=1e-12) and n["kl_opt"] > 0.1


def test_exact_numbers_against_loops():
    """Win rate, KL, J and ratio by plain sums over all pairs of one prompt."""
    p, (pi, ref, mu) = data.World("cyclic").pstar[:1], (z[:1] for z in random_policies())
    n = data.exact(pi, ref, {"x": mu}, p, mu.exp(), torch.square, 0.1)
    a, r, m = (np.exp(z[0].numpy()) for z in (pi, ref, mu))
    kl = sum(a[i] * math.log(a[i] / r[i]) for i in range(400))
    win, worth = (sum(a[i] * m @ p[0, i].numpy() ** k for i in range(400)) for k in (1, 2))
    assert n == approx({"kl_ref": kl, "win": win, "objective": worth - 0.1 * kl,
                        "kl_x": (a * np.log(a / m)).sum(), "ratio": np.abs(np.log(a / r)).max()})


def test_infinite_worth_is_the_limit_of_large_worth():
    """Logit of preferences that are sure but for e: as e falls, eq. 7 tends to the answer for e = 0."""
    p = [[0.5, 0.7, 1, 0.6], [0.3, 0.5, 1, 0.6], [0, 0, 0.5, 1], [0.4, 0.4, 0, 0.5]]  # most wins: the third
    near, limit = (policy_of(p, [0.3, 0.2, 0.1, 0.4], [0.1, 0.2, 0.3, 0.4], 0.5, psi)
                   for psi in (lambda q: torch.logit(q).clamp(-1000, 1000), torch.logit))
    assert torch.allclose(limit, near, atol=1e-9) and (limit[2:] == 0).all() and 0.1 < limit[1] < 0.9


POSED = {"block_size": 4, "vocab_size": 9, "head_size": 4}  # sizes of the world below


def posed(*argv):
    """A world of 4 prompts and 13 responses, given a random reference."""
    data.WORLDS["bt"] = ["superb", "dull", "hot"], 2
    source = ipo.WorldSource(options("--pairs", 64, "--tau", 0.5, *argv))
    source.pose(gpt(**POSED), None, torch.Generator().manual_seed(0))
    return source


@cases("labels", ["hard", "soft"])
@cases("psi", [identity, tanh, torch.square, torch.sqrt])
@cases("more", [[], ["--noise", 0.2, "--mu", "ref"]])
def test_labels_is_where_endless_labels_lead(labels, psi, more):
    """The expected loss has slope 0 there; it is pi* exactly if the labels can say what Psi asks for."""
    ipo.psi = psi
    source = posed("--labels", labels, *more)
    ref, mu, p = source.ref[2], source.mu[2], source.pstar[2]
    noise, drawn = 0.2 if more else 0, source.pairs.chosen
    source.draw(64, source.mu, labels, noise, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, source.pairs.chosen)  # from this mu, with this noise
    q = p + noise * (1 - 2 * p)

    def loss(logp):
        h = (logp - ref)[:, None] - (logp - ref)
        won, lost, soft = ipo.ipo_loss(h, f64(1), 0.5), ipo.ipo_loss(-h, f64(1), 0.5), ipo.ipo_loss(h, q, 0.5)
        return (mu[:, None] * mu * (soft if labels == "soft" else q * won + (1 - q) * lost)).sum()

    best = data.optimum(source.ref, psi(source.pstar), source.mu, 0.5)
    assert slope(loss, source.exact["labels"][2].exp().tolist()) < 1e-6 < slope(loss, ref.exp().tolist())
    assert torch.equal(source.exact["opt"], best) and torch.allclose(mu, ref.exp() if more else f64(1 / 13))
    reached = not more and (psi is identity or labels == "soft" and psi is tanh)
    assert torch.allclose(source.exact["labels"], best, atol=1e-9) == reached


# ------------------------------------------------------------------------------------------- pairs from files

def pair(chosen="good", rejected="bad", prompt="q: ", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def write(path, *lines):
    """A JSONL file of texts and objects -> its name."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8", errors="surrogateescape")
    return str(path)


def some_pairs(folder):
    rows = (pair(f"good {i}", f"bad {i}", f"question {i}?", p=[0.2, 0.8, 0.8][i % 3]) for i in range(30))
    return write(folder / "pairs.jsonl", *rows)


def encoded(*pairs):
    return data.encode([data.Pair(**p) for p in pairs], data.get_tokenizer("bytes"), 32)


def test_jsonl_is_read_as_written(tmp_path, capsys):
    """With and without p; Unicode of all kinds; a byte-order mark; what is not used is counted."""
    odd = pair("é 🙂 \u05d0 \x00", p=0.25)
    path = write(tmp_path / "a.jsonl", pair(), "", odd | {"score": 1}, " ", "\ufeff" + json.dumps(pair(p=1)))
    expected = [data.Pair(**p, where=f"{path}:{line}") for line, p in ((1, pair()), (3, odd), (5, pair()))]
    assert list(data.read_jsonl(path)) == expected
    notes = [line.removeprefix(path) for line in capsys.readouterr().out.splitlines()]
    assert notes == [": 2 blank lines skipped", ": 1 lines with key 'score', not used"]


def test_anthropic_hh_is_cut_after_the_last_shared_turn(tmp_path):
    """Two whole dialogues: the prompt is what both share, up to the last "Assistant:" in it."""
    shared = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
    answers = " so long", " so what\n\nHuman: ?\n\nAssistant: !"
    path = write(tmp_path / "hh.jsonl", {"chosen": shared + answers[0], "rejected": shared + answers[1]})
    assert [p[:4] for p in data.read_jsonl(path)] == [(shared, *answers, 1.0)]


NOT_PAIRS = r"""
{                                        -> no JSON in UTF-8
9999...                                  -> no JSON in UTF-8
[[[[...                                  -> no JSON in UTF-8
{"prompt": "\ud83d", "chosen": "a"}      -> no JSON in UTF-8
{"prompt": "LATIN 1", "chosen": "a"}     -> no JSON in UTF-8
[1]                                      -> not an object
null                                     -> not an object
3                                        -> not an object
{"a": 1}                                 -> key 'chosen' is missing; add it (found: a)
{}                                       -> key 'chosen' is missing; add it (found: none)
{"prompt": "q", "chosen": "a"}           -> key 'rejected' is missing
{"chosen": "a", "rejected": "b"}         -> share no '\n\nAssistant:'
{"chosen": "\n\nAssistant:", "rejected": "\n\nAssistant: b"} -> 'chosen' is empty
{"prompt": "", "chosen": "", "rejected": "b"}                -> 'chosen' is empty
{"prompt": "", "chosen": "a", "rejected": ""}                -> 'rejected' is empty
{"prompt": "", "chosen": 3, "rejected": "b"}                 -> 'chosen' is not a text
{"prompt": "", "chosen": "a", "rejected": [{"role": "user"}]} -> 'rejected' is not a text
{"prompt": null, "chosen": "a", "rejected": "b"}             -> 'prompt' is not a text
{"prompt": "", "chosen": "a", "rejected": "b", "p": 1.5}     -> 'p' is 1.5
{"prompt": "", "chosen": "a", "rejected": "b", "p": -0.1}    -> 'p' is -0.1
{"prompt": "", "chosen": "a", "rejected": "b", "p": "1"}     -> 'p' is 1
{"prompt": "", "chosen": "a", "rejected": "b", "p": true}    -> 'p' is True
{"prompt": "", "chosen": "a", "rejected": "b", "p": NaN}     -> 'p' is nan
{"prompt": "", "chosen": "a", "rejected": "b", "p": null}    -> 'p' is None
"""


@cases("row", NOT_PAIRS.strip().splitlines())
def test_a_bad_line_is_named(tmp_path, row):
    """One line: file, number, key, and a remedy behind a semicolon. (... stands for 100,000 more.)"""
    line, message = row.split(" -> ")
    line = line.replace("...", line[0] * 100_000).replace("LATIN 1", "\udce9")  # a byte that is not UTF-8
    path = write(tmp_path / "b.jsonl", pair(), line)
    with pytest.raises(data.Refused) as error:
        list(data.read_jsonl(path))
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert re.fullmatch(".{1,300}[;:] (write|add|it is|fill).*", str(error.value))


def test_a_read_error_names_the_data(monkeypatch):
    """A disk that fails; a tokenizer that can be had neither from disk nor from the network."""
    broken = mock.mock_open()
    broken.return_value.__iter__.side_effect = OSError(5, "Input/output error")
    monkeypatch.setattr(data, "open", broken, raising=False)
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: 1 / 0)
    refused(2, "--data x: Input/output error", "--data", "x", "--tokenizer", "bytes")
    refused(2, "--tokenizer gpt2: neither on disk nor downloaded", "--data", "x")


def test_tokens_of_a_pair():
    """Encoded apart; the response ends with <|endoftext|>, which is scored, as is nothing before it."""
    end, pairs = "<|endoftext|>", encoded(pair("ab", "c", "xyz"), pair("é", "<|endoftext|>", "", p=0.25))
    batch = pairs.batch(torch.tensor([1, 0]))
    rows = [[data.get_tokenizer("bytes").decode(t[m == scored].tolist()) for scored in (False, True)]
            for t, m in zip(batch.tokens[:, :6], batch.mask[:, :6])]  # padding is id 0, which is `end` here
    assert rows == [[end * 3, f"é{end}"], ["xyz", f"ab{end}"], [end, "<|end"], ["xyz" + end, f"c{end}"]]
    assert batch.mask.sum(1).tolist() == [3, 3, 14, 2] and batch.p.tolist() == [0.25, 1]  # it has 13 bytes


def test_what_is_cut_and_dropped_is_counted(capsys):
    """Prompts are cut from the left, alike for both responses; responses never are."""
    digits, text = "0123456789" * 4, data.get_tokenizer("bytes").decode
    kept = encoded(pair("long" * 9), pair("same", "same"), pair("yes", "no", digits), pair(prompt=""),
                   pair(p=0.2), pair(" "), pair("x" * 30), pair("y", "z" * 31))
    tokens, mask = kept.padded(torch.arange(10))
    assert [text(row[:28].tolist()) for row in tokens[:2]] == [digits[-28:]] * 2
    assert mask.sum(1).tolist() == [4, 3, 5, 4, 5, 4, 2, 4, 31, 4] and mask[0, 28:].all()
    notes = re.findall(r"^data, of 8 pairs: (\d) \w+ (\w+)", capsys.readouterr().out, re.M)
    assert " ".join(map(" ".join, notes)) == "2 dropped 1 dropped 2 cut 1 prompts 1 with 1 with"


def test_held_out_prompts_are_never_trained_on():
    """The share of prompts, not of pairs; prompts equal once cut stay together; never all of them."""
    pairs = encoded(*(pair(f"a{i}", f"b{i}", f"q{i // 4}") for i in range(40)))
    train, held = data.split(pairs, 0.27, torch.Generator().manual_seed(0))
    assert len(held) == 12 and sorted([*train.tolist(), *held.tolist()]) == list(range(40))
    assert not set(pairs.prompt[train].tolist()) & set(pairs.prompt[held].tolist())
    cut = encoded(*(pair("yes", "no", f"{i}" + "z" * 60) for i in range(5)))
    assert [len(data.split(few, share, None)[1]) for few, share in ((cut, 1.0), (pairs, 0.0))] == [0, 0]


@cases("n, size", [(7, 3), (3, 7)])
def test_batches_see_every_pair_once_an_epoch(n, size):
    """21 in a row are all of 0..n-1, in another order each time, also if a batch is more than an epoch."""
    order = torch.cat(list(data.batches(n, size, 21 // size, torch.Generator().manual_seed(0)))).tolist()
    epochs = [order[i:i + n] for i in range(0, 21, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len({*map(tuple, epochs)}) > 1


# ----------------------------------------------------------------------------------------- numbers, training

@cases("h, p, accuracy", [([1, -1, 4e-4], [1] * 3, 0.5), ([2, 2], [0.9, 0.1], 0.5), ([2, 1], [0.5, 1], 0.75)])
def test_accuracy_counts_ties_one_half_and_reads_the_label(h, p, accuracy):
    """Ties in h or in p; a label below one half asks for the rejected response."""
    logp = f64([*h, *[0] * len(h)])
    assert ipo.measure(logp, torch.zeros(()), f64(p), options())["accuracy"] == approx(accuracy)


def test_numbers_of_a_batch_against_numpy():
    """Means, a spread and the loss; None (shown as -) is DPO's target at p = 1, which is infinite."""
    p, (logp, ref) = np.array([1, 0.8, 0.3]), np.random.default_rng(0).normal(size=(2, 6))
    chosen, rejected = (logp - ref).reshape(2, 3)
    h, argv = chosen - rejected, ("--tau", 0.5, "--loss")
    n, dpo = (ipo.measure(f64(logp), f64(ref), f64(p), options(*argv, loss)) for loss in ("ipo", "dpo"))
    assert n == approx({"loss": ((h - 2 * p + 1) ** 2).mean(), "h": h.mean(), "h_std": h.std(), "target": 0.4,
                        "chosen": chosen.mean(), "rejected": rejected.mean(), "accuracy": n["accuracy"]})
    assert [ipo.show(x) for x in (dpo["target"], -0.00001, 1 / 3)] == ["-", "0.0000", "0.3333"]


@cases("steps, expected", [(4, {1: 1 / 3, 2: 2 / 3, 3: 1, 4: 1 / 2}), (1, {1: 1}),
                           (2000, {50: 50 / 51, 51: 1, 1026: 1 / 2, 2000: 1 / 1950})])
def test_the_learning_rate_rises_and_falls_to_zero(steps, expected):
    """50 steps, or half of all, up to the peak; then in a straight line to 0 after the last. No decay."""
    policy, rates = torch.nn.Linear(1, 1), {}
    optimizer = ipo.adamw(policy)
    for step in expected:
        ipo.descend(policy, optimizer, step, steps, 2.0)
        rates[step] = optimizer.param_groups[0]["lr"] / 2
    assert rates == approx(expected) and optimizer.param_groups[0]["weight_decay"] == 0


@cases("loss, form, holdout, start, written_out", [
    ("ipo", "sum", 0.3, 9, lambda h, p: (h - 5 * (2 * p - 1)) ** 2),
    ("dpo", "mean", 0.01, 0.693147, lambda h, p: torch.log1p((-h / 10).exp()) + (1 - p) * h / 10)])
def test_a_run_is_these_steps(tmp_path, loss, form, holdout, start, written_out):
    """With full logits, a second model and soft labels: losses of SFT, of training and of held-out pairs
    (of all if none are); their h."""
    argv = "--data", some_pairs(tmp_path), *SMALL, "--loss", loss, "--logp", form, "--holdout", holdout
    said = cli(*argv, "--lr", 0.01, "--sft_lr", 0.01, "--log_every", 1, "--out", tmp_path / "run")
    source, generator, losses = ipo.FileSource(options(*argv)), torch.Generator().manual_seed(0), []
    train, padded, p, rows = source.train, source.pairs.padded, source.pairs.p, torch.arange(60).view(30, 2)
    held = torch.tensor(sorted({*range(30)} - {*train.tolist()}) or range(30))
    torch.manual_seed(0)
    policy = model.GPT(model.GPTConfig(*source.sizes, n_layer=1, n_head=4, n_embd=16))

    def steps(n, size, examples, loss_of):
        optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99))
        for k, index in enumerate(data.batches(len(examples), size, n, generator), 1):
            losses.append(loss_of(examples[index]))
            losses[-1].backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 0.01 * min(k / (n // 2 + 1), (n - k + 1) / (n - n // 2))
            optimizer.step()
            optimizer.zero_grad()

    def h(pairs):
        tokens, mask = padded(rows[pairs].T.flatten())  # chosen, rejected
        ratio = plain_logp(policy, tokens, mask) - plain_logp(ref, tokens, mask).detach()
        chosen, rejected = (ratio / mask.sum(1) if form == "mean" else ratio).chunk(2)
        return chosen - rejected

    steps(3, 8, rows[train].T.flatten(), lambda r: -plain_logp(policy, *padded(r)).sum() / padded(r)[1].sum())
    ref, log = copy.deepcopy(policy), metrics(tmp_path / "run")
    steps(6, 4, train, lambda pairs: written_out(h(pairs), p[pairs]).mean())
    assert f"3/3 | loss {losses[2]:8.4f} nats" in said and f", theory {start:g} (the loss at h = 0)" in said
    assert float(re.search(r"step 0: loss (\S+), theory", said)[1]) == approx(start, rel=1e-5)
    assert [line["batch"]["loss"] for line in log] == approx([x.item() for x in losses[3:]], rel=1e-4)
    n, means = log[-1]["eval"], torch.stack([h(held), written_out(h(held), p[held])]).mean(1).tolist()
    assert [n["h"], n["loss"], len(held)] == approx([*means, 30 * holdout // 1 or 30], rel=1e-4, abs=1e-5)


@cases("logp, wrong", [("sum", {"of": 1}), ("mean", {"form": "sum"}), ("sum", {"form": "mean"})])
def test_a_wrong_reference_stops_the_run(tmp_path, logp, wrong):
    """A cache that another model made, or in another form, gives margins at step 0; nothing is saved."""
    other, batch = gpt(wrong.get("of", 0), vocab_size=257), encoded(pair("ab", "c")).batch(torch.tensor([0]))
    ref_logp = ipo.sequence_logp(other, batch.tokens, batch.mask, wrong.get("form", logp) == "mean")
    with pytest.raises(ipo.Stopped, match="the reference is not pi"):
        ipo.train(gpt(vocab_size=257), [(batch, ref_logp)], options("--out", tmp_path, "--logp", logp))
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """(folder, what is printed) of `python ipo.py --loss ipo`, in full."""
    folder = tmp_path_factory.mktemp("default")
    with mock.patch.object(ipo, "psi", identity):
        return folder, cli("--loss", "ipo", "--out", folder)


def test_training_brings_the_language_model_to_the_optimum(default_run):
    """98 % of the distance to pi* is gone; the gap in J is tau KL(pi||pi*); the log is the report's."""
    r, lines = report(default_run[0]), metrics(default_run[0])
    assert r.after["kl_opt"] < r.before["kl_opt"] / 50 and r.before["kl_ref"] == 0
    assert r.opt["objective"] - r.after["objective"] == approx(0.2 * r.after["kl_opt"], rel=1e-3)
    assert r.labels == approx(r.opt, abs=1e-12) and lines[-1]["eval"] == r.after
    assert [line["step"] for line in lines] == list(range(200, 2001, 200))


def enumerated(folder, *argv):
    """The world, and ref.pt and ckpt.pt scored anew, (X,Y) each."""
    world = ipo.WorldSource(options(*argv))
    return world, *(world.enumerate(model.load(f"{folder}/{name}.pt")[0]) for name in ("ref", "ckpt"))


def test_the_report_is_of_the_saved_models(default_run):
    """KL of enumerated policies; h = E[(2p - 1) h(y,y')]; the reference is what SFT showed it."""
    r, (world, ref, pi) = report(default_run[0]), enumerated(default_run[0])
    best = data.optimum(ref, world.pstar, torch.full_like(ref, 1 / 400), 0.2)
    for policy, column in ((best, r.opt), (pi, r.after)):
        f, kls = policy - ref, [data.kl(policy, other).item() for other in (ref, best)]
        h = (2 * world.pstar - 1) * (f[:, :, None] - f[:, None, :])
        assert [column["h"], column["kl_ref"], column["kl_opt"]] == approx([h.mean().item(), *kls], abs=0.01)
        assert column["kl_opt"] == approx(kls[1], rel=1e-3, abs=1e-9)
    cache = model.load(f"{default_run[0]}/ref.pt")[1]["ref_logp"].view(4, 400)
    assert torch.allclose(cache, ref.float(), atol=1e-5) and data.kl(world.base.log()[None], ref) < 0.01


def test_a_finished_run_is_asked(default_run):
    """--sample says what the model says; a prompt of other words, or too long, is refused."""
    ask = "--out", default_run[0], "--sample"
    best = model.load(default_run[0] / "ckpt.pt")[0], data.World("bt").tokenizer, data.World("bt").prompts[0]
    ask_another = "--init_from", default_run[0] / "ckpt.pt", "--temperature", 0, "--sample"
    assert cli(*ask_another, "review of the pizza:") == f"review of the pizza:{model.generate(*best, 0)}\n"
    refused(2, "holds words that the model never saw", *ask, "review of the sushi:")
    refused(2, "a prompt of 5 tokens fills the context of 5", *ask, "review of the pizza: hot hot hot")


@cases("argv, bound", [("--data cyclic --labels soft --tau 0.5 --steps 200", 0.005),
                       ("--mu ref --tau 1 --steps 150 --noise 0.2", 0.01)])
def test_a_short_run_reaches_the_optimum_of_its_labels(tmp_path, argv, bound):
    """Intransitive and soft, or noisy and mu the reference: four fifths of the way, and below the bound."""
    cli(*argv.split(), "--pairs", 50_000, "--sft_steps", 40, "--out", tmp_path)
    r = report(tmp_path)
    assert r.after["kl_labels"] < min(bound, r.before["kl_labels"] / 5)
    assert (r.labels["kl_opt"] > 1e-3) == ("--noise" in argv)


def test_in_the_deterministic_world_dpo_never_stops(tmp_path):
    """Its log-ratios grow with the steps towards a limit that no policy attains; IPO's end at pi*."""
    flags = "--data", "deterministic", "--tau", 1, "--pairs", 30_000, "--sft_steps", 30, "--out", tmp_path
    short, long, calm = (cli(*flags, "--loss", loss, "--steps", steps) and report(tmp_path)
                         for loss, steps in (("dpo", 50), ("dpo", 150), ("ipo", 150)))
    assert [long.opt["ratio"], long.before["kl_opt"], long.opt["kl_opt"]] == [None, None, 0]
    assert short.after["kl_ref"] + 0.2 < long.after["kl_ref"] < long.opt["kl_ref"]
    assert calm.after["kl_opt"] < 0.02 and calm.opt["ratio"] < 1 < long.after["ratio"]


@cases("argv", [["--logp", "mean"], ["--dtype", "bfloat16"]])
def test_the_mean_form_and_bfloat16_are_measured_like_the_others(tmp_path, argv):
    """Both start where theory says; pi is enumerated with the sum, and scored in the loop's dtype."""
    assert "step 0: loss 6.25, theory 6.25" in cli(*SHORT, *argv, "--out", tmp_path)
    (_, ref, pi), (_, _, exact), r = enumerated(tmp_path, *argv), enumerated(tmp_path), report(tmp_path)
    assert [r.before["kl_ref"], r.after["kl_ref"]] == approx([0, data.kl(pi, ref).item()], rel=1e-3)
    assert torch.equal(exact, pi) == ("mean" in argv) != hasattr(r, "labels")


def test_an_edit_of_psi_is_trained_and_reported(tmp_path):
    """q^4, an assignment: target and pi* change; the column `labels` says where soft labels lead."""
    cli(*SHORT, "--labels", "soft", "--out", tmp_path / "a")
    ipo.psi = lambda q: q**4
    cli(*SHORT, "--labels", "soft", "--out", tmp_path / "b")
    paper, mine = report(tmp_path / "a"), report(tmp_path / "b")
    assert paper.labels["kl_opt"] < 1e-12 < 0.01 < mine.labels["kl_opt"]
    assert all(abs(mine.opt[key] - paper.opt[key]) > 0.01 for key in ("kl_ref", "target", "objective"))


def test_an_infinite_target_is_refused_with_the_lesson(tmp_path):
    """Logit on certain pairs; soft labels of Bradley-Terry train."""
    ipo.psi = torch.logit
    refused(2, "DPO's over-fitting", *SHORT, "--out", tmp_path)
    cli(*SHORT, "--labels", "soft", "--overwrite", "--out", tmp_path)


def test_a_run_starts_from_another_or_from_gpt2(tmp_path):
    """Its weights are the reference, without SFT unless asked; tokenizer and context are its own."""
    few = ["--data", some_pairs(tmp_path), "--steps", 2, "--batch_size", 4, "--init_from"]
    hugging_face().save_pretrained(tmp_path / "hf")
    assert "sft" not in cli(*few, tmp_path / "hf", "--tokenizer", "bytes", "--out", tmp_path / "a")
    assert "sft" in cli(*few, tmp_path / "a/ref.pt", "--sft_steps", 1, "--out", tmp_path / "b")
    a, b = (model.load(tmp_path / name / "ref.pt")[0] for name in "ab")
    assert same(a, model.GPT.from_pretrained(tmp_path / "hf")) and not same(a, b)
    assert json.loads((tmp_path / "b/config.json").read_text())["block_size"] == 64


@cases("flag, kept", [("--lr", True), ("--sft_lr", False)])
def test_divergence_stops_the_run_and_keeps_what_was_saved(tmp_path, flag, kept):
    """Status 1, one line; no weights that are not finite are saved."""
    refused(1, "lower --lr or --sft_lr", *SHORT, flag, 1e9, "--out", tmp_path)
    assert (tmp_path / "ref.pt").exists() == kept and not (tmp_path / "ckpt.pt").exists()


# ---------------------------------------------------------------------------------------- a run to be trusted

def outcome(folder):
    """What a run leaves, but its flags: bit for bit."""
    texts = {name: Path(folder, name).read_text() for name in ("metrics.jsonl", "report.json")}
    states = {name: torch.load(Path(folder, name), weights_only=True) for name in ("ref.pt", "ckpt.pt")}
    return texts | {name: json.dumps(state, default=torch.Tensor.tolist) for name, state in states.items()}


def stopped(owner, name, n, error=SystemExit):
    """Within this context the nth call of owner.name raises the error instead."""
    effects = [mock.DEFAULT] * (n - 1) + [error] + [mock.DEFAULT] * 999
    return mock.patch.object(owner, name, wraps=getattr(owner, name), side_effect=effects)


STOPS = [(os, "replace", 1), (os, "replace", 2), (os, "replace", 5), (ipo, "descend", 2),
         (ipo, "descend", 18), (ipo, "Path", 2), (ipo, "Path", 5)]  # saves, steps of SFT and training, log


@cases("kind", ["world", "file"])
def test_a_resumed_run_is_the_same_run(tmp_path, kind):
    """Stopped half-way in a save, in SFT, in a step, before the log is written: it leaves the same."""
    flags = SHORT if kind == "world" else ["--data", some_pairs(tmp_path), *SMALL]
    flags = [*flags, "--steps", 20, "--log_every", 5, "--seed", 3]
    whole = cli(*flags, "--out", tmp_path / "whole")
    for i, stop in enumerate(STOPS):
        with stopped(*stop), pytest.raises(SystemExit):
            cli(*flags, "--out", tmp_path / str(i))
        resumed = cli("--resume", "--out", tmp_path / str(i))
        assert outcome(tmp_path / str(i)) == outcome(tmp_path / "whole"), stop
        assert resumed.splitlines()[-3:] == whole.splitlines()[-3:]


KILLED = """
import itertools, os, sys, ipo
calls, save, ipo.psi = itertools.count(1), os.replace, lambda q: q
os.replace = lambda *names: os.kill(os.getpid(), 9) if next(calls) == 4 else save(*names)
ipo.main(sys.argv[1:])
"""


def test_kill_9_loses_nothing(tmp_path):
    """A process that dies in its fourth save, then goes on: it is the same seed's run, and not another's."""
    flags = [*SHORT, "--log_every", "4", "--sft_steps", "0", "--device", "cpu"]
    died = subprocess.run([sys.executable, "-c", KILLED, *flags, "--out", tmp_path / "0"], cwd=HERE)
    assert died.returncode == -9 and "resumed after step 8" in cli("--resume", "--out", tmp_path / "0")
    for seed in (0, 1):
        cli(*flags, "--seed", seed, "--out", tmp_path / "whole")
        assert (outcome(tmp_path / "whole") == outcome(tmp_path / "0")) == (seed == 0)


@cases("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device\n")])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, error):
    """A write that fails names the file; what was saved is whole, and the run that goes on ends as any."""
    with stopped(torch, "save", 3, error):
        refused(2, "ckpt.pt: cannot be written (No space left on device)", *SHORT, "--out", tmp_path)
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 10
    assert "resumed after step 10" in cli("--resume", "--out", tmp_path)


def test_what_contradicts_a_run_is_refused(tmp_path):
    """One line each, and the run is as it was; a flag that agrees may be repeated; no run, no --resume."""
    resume = "--resume", "--out", tmp_path
    refused(2, f"{tmp_path}/config.json is not that of a run", *resume)
    cli(*SHORT, "--out", tmp_path)
    kept = outcome(tmp_path)
    for flag, value, was in (("tau", 0.5, 0.2), ("steps", 30, 20), ("data", "cyclic", "bt")):
        refused(2, f"--{flag} {value} contradicts the run in {tmp_path}/: {was}", *resume, f"--{flag}", value)
    cli(*resume, "--tau", 0.2)
    assert outcome(tmp_path) == kept


def test_only_a_finished_run_in_a_world_is_replaced(tmp_path):
    """It takes seconds to make again; an unfinished run, or one on a file, needs --overwrite."""
    world, file = ([*SHORT, "--out", tmp_path / "w"],
                   ["--data", some_pairs(tmp_path), *SMALL, "--out", tmp_path / "f"])
    assert "replaced" not in cli(*world) + cli(*file)
    assert "is replaced" in cli(*world, "--seed", 1)
    (tmp_path / "w/report.json").unlink()
    for flags in (world, file, [*SHORT, "--out", tmp_path / "f"]):
        refused(2, "holds a run: --resume it, --overwrite it or name another", *flags)
    with stopped(ipo, "descend", 1, KeyboardInterrupt):
        refused(1, "interrupted; --resume goes on where it was saved", *file, "--overwrite")
    assert os.listdir(tmp_path / "f") == ["config.json"]  # nothing of the old run is left


BAD_COMMANDS = """
--tau 0            -> --tau 0.0 is out of range; give a number from
--tau nan          -> --tau nan is out of range
--tau inf          -> --tau inf is out of range
--tau x            -> argument --tau: invalid float value: 'x'
--steps 0          -> --steps 0 is out of range
--steps 1.5        -> argument --steps: invalid int value: '1.5'
--batch_size 0     -> --batch_size 0 is out of range
--pairs 0          -> --pairs 0 is out of range
--seed -1          -> --seed -1 is out of range
--noise 2          -> --noise 2.0 is out of range
--holdout -0.1     -> --holdout -0.1 is out of range
--sft_steps -1     -> --sft_steps -1 is out of range
--sft_lr nan       -> --sft_lr nan is out of range
--log_every 0      -> --log_every 0 is out of range
--temperature -1   -> --temperature -1.0 is out of range
--loss kto         -> invalid choice: 'kto'
--labels maybe     -> invalid choice: 'maybe'
--dtype float16    -> invalid choice: 'float16'
--device tpu       -> invalid choice: 'tpu'
--nonsense         -> unrecognized arguments: --nonsense
--n_embd 30        -> --n_embd 30 is no multiple of --n_head 4; change one
--data no.jsonl    -> --data no.jsonl: No such file or directory; name a JSONL file
--data .           -> --data .: Is a directory
--data empty.jsonl -> no usable pair among 0
--data same.jsonl  -> no usable pair among 1
--data bad.jsonl   -> bad.jsonl:2: 'chosen' is empty
--data good.jsonl --init_from world.pt -> its model knows other words
--data good.jsonl --tokenizer x -> --tokenizer x: neither on disk
--init_from bytes.pt    -> its model knows other words than --data bt
--init_from cut.pt      -> cut.pt: no whole checkpoint
--init_from no.pt       -> no.pt: no whole checkpoint ([Errno 2] No such file
--init_from bad.jsonl   -> --init_from bad.jsonl:
--sample x              -> No such file or directory: 'out/ckpt.pt'); name the ckpt.pt that a run left
--sample x --out cut.pt -> Not a directory: 'cut.pt/ckpt.pt'
--out good.jsonl        -> File exists: 'good.jsonl'
--resume                -> out/config.json is not that of a run
"""


def test_bad_input_is_one_line_and_status_two(tmp_path, monkeypatch):
    """No traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    files = {"good": [pair()], "bad": [pair(), pair("")], "same": [pair("a", "a")], "empty": []}
    for name, lines in files.items():
        write(tmp_path / f"{name}.jsonl", *lines)
    saved(tmp_path / "world.pt", tokenizer=data.World("bt").tokenizer.name)
    (tmp_path / "cut.pt").write_bytes(saved(tmp_path / "bytes.pt", tokenizer="bytes")[:3000])
    before = sorted(os.listdir())
    for flags, message in (line.split("->") for line in BAD_COMMANDS.strip().splitlines()):
        refused(2, message.strip(), "--tokenizer", "bytes", *flags.split())
    assert sorted(os.listdir()) == before


def test_the_program_ends_with_its_status():
    """As a process; --help explains every flag, at most 32, and its default."""
    bad = subprocess.run([sys.executable, "ipo.py", "--tau", "0"], cwd=HERE, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("ipo.py: --tau 0.0") and bad.stderr.count("\n") == 1
    flags, text = vars(options()), " ".join(ipo.flags().format_help().split())
    assert len(flags) <= 32 and all(f"--{flag} " in text for flag in flags)
    assert ipo.FOR_A_FILE.items() <= vars(options("--data", "x")).items()
    assert all(f"[{value}]" in text for value in flags.values() if value is not False)


# ------------------------------------------------------- what a user's code adds, the core unchanged

def test_a_loss_of_ones_own_is_trained_and_with_its_worth_measured(tmp_path):
    """A line; a second one names its Psi: then pi* is known, else that it is not is said."""
    ipo.LOSSES["mine"] = lambda h, p, tau: (h - torch.logit(p) / tau) ** 2
    flags = [*SHORT, "--loss", "mine", "--labels", "soft", "--out", tmp_path]
    assert "pi* is unknown" in cli(*flags) and report(tmp_path).after["kl_opt"] is None
    ipo.WORTH["mine"] = torch.logit
    assert "pi* is unknown" not in cli(*flags) and report(tmp_path).after["kl_opt"] > 0


class HuggingFace(torch.nn.Module):
    """A model of transformers as the policy: hidden, head and sizes."""

    def __init__(self, hf):
        super().__init__()
        self.hf, self.head = hf.transformer, hf.lm_head
        self.config = Namespace(block_size=hf.config.n_positions, vocab_size=hf.config.vocab_size)

    def hidden(self, tokens, wanted=None):
        return self.hf(tokens).last_hidden_state


def test_a_model_of_ones_own_trains_and_resumes_bit_for_bit(tmp_path):
    """transformers' GPT-2, stopped in its third step after SFT."""
    flags = "--data", some_pairs(tmp_path), *SMALL, "--out"
    ipo.run(options(*flags, tmp_path / "whole"), policy=HuggingFace(hugging_face()))
    with stopped(ipo, "descend", 6), pytest.raises(SystemExit):
        ipo.run(options(*flags, tmp_path / "cut"), policy=HuggingFace(hugging_face()))
    ipo.run(options("--resume", "--out", tmp_path / "cut"), policy=HuggingFace(hugging_face(1.0)))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_pairs_of_ones_own_are_a_source(tmp_path):
    """Any iterable of Pair."""
    args = options("--data", "sums", *SMALL, "--out", tmp_path)
    pairs = (data.Pair(f"{i} + {i} =", f" {2 * i}", f" {2 * i + 1}") for i in range(20))
    ipo.run(args, source=ipo.FileSource(args, pairs=pairs))
    assert report(tmp_path).after["h"] > 0


def online(policy, source, pairs=torch.arange(64)):
    """Batches of pairs that the policy, as it is now, says; the reference is looked up."""
    while True:
        source.draw(len(pairs), source.enumerate(policy).exp(), "hard", 0.0, torch.Generator())
        yield source.pairs.batch(pairs), source.ref.flatten()[source.pairs.pair_rows(pairs)].float()


def test_the_loop_takes_pairs_that_are_made_online(tmp_path):
    """It goes uphill, and evaluate says how far."""
    source, policy = posed("--out", tmp_path, "--steps", 50, "--log_every", 25, "--loss", "dpo"), gpt(**POSED)
    ipo.train(policy, online(policy, source), source.args, source.evaluate)
    first, last = (line["eval"] for line in metrics(tmp_path))
    assert 0 < first["kl_ref"] < last["kl_ref"] and first["win"] < last["win"]


# ------------------------------------------------------------------------------------------------- the house

NO_CODE = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()
CAPS = {"ipo": 300, "model": 200, "data": 220, "test_ipo": 700, "explore": 160, "exercises": 300}  # else 120
CORE = [HERE / name for name in ("ipo.py", "model.py", "data.py")]
LAB = [path for path in sorted(HERE.glob("lab/*.py")) if "test_" not in path.name]


@cases("path", [*CORE, HERE / "test_ipo.py", *LAB], ids=lambda path: path.name)
def test_a_file_is_small_enough_to_be_read(path):
    """Code lines and width; of the core also tokens a line, lines a function, and that it knows no lab."""
    text = path.read_text(encoding="utf-8")
    text = re.sub("# =+ (EXERCISE|ANSWERS).*?# =+ END", "# END", text, flags=re.S)  # theirs to fill
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Expr, ast.FunctionDef))]
    docs = [node.lineno for node in nodes if isinstance(getattr(getattr(node, "value", 0), "value", 0), str)]
    tokens = [token.start[0] for token in tokenize.generate_tokens(io.StringIO(text).readline)
              if tokenize.tok_name[token.type] not in NO_CODE and token.start[0] not in docs]
    assert len({*tokens}) <= CAPS.get(path.stem, 120) and max(map(len, text.splitlines())) <= 110
    for node in nodes * (path in CORE):
        cap = 50 if getattr(node, "name", "") == "run" else 40
        assert len({*tokens} & {*range(node.lineno, node.end_lineno + 1)}) <= cap, node.name
    assert path not in CORE or len(tokens) <= 13 * len({*tokens}) and not re.search("(import|from) lab", text)


def blocks(kind):
    """Lines of the README's fenced blocks of a kind."""
    return "".join(re.findall(rf"^```{kind}\n(.*?)^```", README, re.S | re.M)).splitlines()


def test_the_readme_is_short_and_quotes_the_code():
    """16 KB; every line of its Python blocks stands in a source, letter for letter (psi as it was)."""
    sources = {line.strip() for path in CORE for line in path.read_text(encoding="utf-8").splitlines()}
    quoted = {line.strip() for line in blocks("python")}
    assert len(README.encode()) <= 16384 and quoted and not quoted - sources - {"", "...", "return q"}


def test_what_the_readme_names_exists():
    """Files, pictures, tests; on a line that is linked to stands the code that is quoted beside the link."""
    prose = re.sub("^```.*?^```", "", README, flags=re.S | re.M)
    # an edit of psi may have moved the lines
    edited = "    return q\n\n\n# ===" not in (HERE / "ipo.py").read_text(encoding="utf-8")
    for line in prose.splitlines():
        for name, number in re.findall(r"\]\((?!https:|lab/|#)([^)#]+)(?:#L(\d+))?\)", line):
            source = (HERE / name).read_text(encoding="utf-8", errors="replace").splitlines()
            shown = source[int(number) - 1] if number and not edited else line
            assert all(code in shown for code in re.findall("`(.+?)`", line)), line
    tests = "".join(str(path.read_bytes()) for path in [*HERE.glob("test_*.py"), *HERE.glob("lab/test_*.py")])
    names = re.findall(r"\btest_\w+\b(?!\.py)", prose)
    assert names and not [name for name in names if f"def {name}(" not in tests]


def test_the_first_command_prints_what_the_readme_says(default_run):
    """Line by line, every number within 3 % (a batch's: .05); `...` stands for what is left out."""
    number = r"[-+]?\d+\.?\d*"
    block = re.search(r"<!-- measured: python ipo.py --loss ipo -->\s*```\w*\n(.*?)```", README, re.S)[1]
    for line in filter(str.strip, block.splitlines()):
        words = r"\s*".join(re.escape(word) for word in re.sub(number, "#", line).split())
        pattern = re.compile(r"\s*" + words.replace(r"\#", f"({number})").replace(re.escape("..."), ".*?"))
        printed = [match.groups() for match in map(pattern.match, default_run[1].splitlines()) if match]
        said, slack = list(map(float, re.findall(number, line))), 0.05 if "/" in line else 2e-3
        assert any([*map(float, found)] == approx(said, rel=0.03, abs=slack) for found in printed), line


def test_readme_commands_run(tmp_path, monkeypatch):
    """Each `python ipo.py` of the shell blocks, in order, with few steps, on pairs of our own."""
    monkeypatch.chdir(tmp_path)
    some_pairs(tmp_path)
    commands = [shlex.split(part, comments=True) for line in blocks("sh") for part in line.split("&&")]
    programs = [words[2:] for words in commands if words[:2] == ["python", "ipo.py"]]
    assert len(programs) >= 3 and any("pytest" in words for words in commands)
    for words in programs:
        words = ["pairs.jsonl" if word.endswith(".jsonl") else word for word in words]
        few = [] if {"--sample", "--resume"} & {*words} else SMALL if "pairs.jsonl" in words else SHORT
        ipo.parse(words) if "gpt2" in words else cli(*words, *few)  # gpt2 needs a network
