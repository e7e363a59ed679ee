"""Claims of lab/methods/online.py: which pairs are drawn, where training rests, what is said."""
import json
from argparse import Namespace

import pytest
import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.methods import online

FAST = ["--steps", "180", "--sft_steps", "40", "--lr", "1e-2", "--batch_size", "96", "--log_every", "150",
        "--tau", "0.3", "--labels", "soft", "--n_embd", "16"]


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Worlds with 13 responses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.World.__init__, "__defaults__", (["superb", "dull", "hot"], (0, 1/4, 3/4)))
        yield


def finished(tmp_path, *flags):
    """report.json of a run in the tiny deterministic world."""
    argv = ["--data", "deterministic", *FAST, *flags, "--out", str(tmp_path)]
    assert start.main("online", online.run, argv) == 0
    return json.loads((tmp_path / "report.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(folder, report.json) of a run with --offline."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "psi", lambda q: q)
        few = ["--steps", "300", "--lr", "6e-3", "--batch_size", "128"]
        return folder, finished(folder, "--offline", *few)


def far_from(world, seed):
    """A policy nowhere near uniform, whose next word depends on the one before."""
    torch.manual_seed(seed)
    policy = model.GPT(model.GPTConfig(*world.sizes, n_layer=1, n_head=2, n_embd=32))
    for weight in policy.parameters():
        weight.data *= 8 if weight.dim() == 2 else 1
    return policy


@torch.no_grad()
def table(policy, world):
    return exact.Table(world)(policy).double()


def flags(**own):
    usual = {
        "data": "bt", "seed": 0, "tau": 0.2, "b": 0.4,
        "labels": "soft", "steps": 2, "pairs_from": "policy",
        "batch_size": 40_000, "pairs": 400_000,
    }
    return Namespace(**usual | own)


def rows_of(batch, world):
    """The rows of the world that a batch holds, found by their tokens."""
    tokens, _ = world.pairs.padded(torch.arange(world.reward.numel()))
    same = (batch.tokens[:, None] == tokens).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def shares(batch, world):
    """(X,Y,Y): how often each ordered pair of responses stands in a batch, as shares of a prompt's."""
    X, Y = world.reward.shape
    first, second = rows_of(batch, world).chunk(2)
    assert torch.equal(first // Y, second // Y), "a pair has one prompt"
    counts = torch.bincount(first * Y + second % Y, minlength=X * Y * Y).view(X, Y, Y)
    return counts / counts.sum((1, 2), keepdim=True)


def pairs_of(law):  # (X,Y) -> (X,Y,Y)
    return law[:, :, None] * law[:, None, :]


def deviations(found, law, n):
    """By how many standard deviations of a share the farthest of them is off."""
    deviation = (law * (1 - law) / n).sqrt() + 1e-4
    return ((found - law) / deviation).abs().max().item()


@pytest.mark.parametrize("pairs_from", ["policy", "mixture", "offline"])
def test_a_pair_is_two_independent_draws_from_its_mu(pairs_from):
    """10,000 pairs a prompt; the other laws of pairs are far off."""
    world, args = data.World("bt"), flags(pairs_from=pairs_from)
    policy = far_from(world, 2)
    ref = table(far_from(world, 1), world)
    pi = table(policy, world)
    mu = table(far_from(world, 3), world)
    mixture = pi.exp() ** 0.6 * ref.exp() ** 0.4
    mixture = mixture / mixture.sum(-1, keepdim=True)
    laws = {"policy": pi.exp(), "mixture": mixture, "offline": mu.exp()}
    batch = next(online.batches(policy, ref, world.pstar, mu, args))
    found = shares(batch, world)
    for name, law in laws.items():
        off = deviations(found, pairs_of(law), 10_000)
        assert (off < 6) == (name == pairs_from), (name, off)


def test_a_batch_holds_the_judges_labels_and_the_references_log_probs():
    world, args = data.World("bt"), flags()
    judge, ref = 1 - world.pstar, table(far_from(world, 1), world)
    batch = next(online.batches(far_from(world, 2), ref, judge, ref, args))
    rows = rows_of(batch, world)
    first, second = rows.chunk(2)
    assert torch.allclose(batch.ref_logp, ref.flatten()[rows].float())
    assert torch.allclose(batch.p, judge[first // 13, first % 13, second % 13].float())


def test_the_next_batch_follows_the_policy():
    world, args = data.World("bt"), flags()
    policy = far_from(world, 2)
    ref = table(policy, world)
    batches = online.batches(policy, ref, world.pstar, ref, args)
    next(batches)
    policy.load_state_dict(far_from(world, 5).state_dict())
    law = table(policy, world).exp()
    found = shares(next(batches), world)
    assert deviations(found, pairs_of(law), 10_000) < 6


def test_the_sampler_carries_no_gradient():
    world, args, recorded = data.World("bt"), flags(), []
    policy = far_from(world, 2)
    hidden = policy.hidden

    def watched(tokens):
        recorded.append(torch.is_grad_enabled())
        return hidden(tokens)

    policy.hidden = watched
    ref = torch.zeros(4, 13).double().log_softmax(-1)
    next(online.batches(policy, ref, world.pstar, ref, args))
    assert recorded == [False]


def test_at_nash_the_gradient_without_the_sampler_vanishes():
    """Float64 autograd on the exact mean over pairs."""
    torch.manual_seed(0)
    world, tau = data.World("deterministic"), 0.2
    ref = torch.randn(world.reward.shape, dtype=torch.float64).log_softmax(-1)
    nash, _ = exact.nash(ref, world.pstar, tau)
    theta = nash.clone().requires_grad_()
    mu = nash.exp()
    h = exact.margins(theta.log_softmax(-1), ref)
    cost = world.pstar * (h - 0.5 / tau) ** 2
    (pairs_of(mu) * cost).sum().backward()
    assert theta.grad.abs().max() < 1e-10


def test_rejection_draws_from_the_tilted_reference():
    """400,000 candidates a prompt: shares of those kept within six deviations of ref exp(r) / Z."""
    world, args = data.World("bt"), flags()
    ref, r = table(far_from(world, 1), world), world.reward
    law = (ref + r).softmax(-1)
    chance = (r - r.amax(-1, keepdim=True)).exp()
    kept = args.pairs * (ref.exp() * chance).sum(-1, keepdim=True)
    shares = online.accepted(ref, r, args).exp()
    assert deviations(shares, law, kept) < 6


def test_rewards_that_accept_nothing_are_refused():
    ref = torch.tensor([[0.0, -99.0]], dtype=torch.float64)
    r = torch.tensor([[0.0, 99.0]], dtype=torch.float64)
    with pytest.raises(data.Refused, match="--pairs"):
        online.accepted(ref, r, flags(pairs=10))


@pytest.mark.parametrize("pairs_from", ["mixture", "rejection"])
def test_training_rests_at_its_own_answer(tmp_path, pairs_from):
    report = finished(tmp_path, "--pairs_from", pairs_from)
    assert report["KL to its exact answer"] < 0.01
    assert report["KL to the reference"] > 0.05


def test_online_and_offline_are_compared(compared):
    """Each ends at its own answer, the two are as far apart as these are, and the sentence says so."""
    _, report = compared
    assert report["KL to its exact answer"] < 0.01
    assert report["KL to the reference"] > 0.05
    assert report["offline to its answer"] < 0.01
    assert report["KL(this||offline)"] == pytest.approx(report["... of exact answers"], abs=0.02)
    assert report["... of exact answers"] > 0.02
    assert f"{report['KL(this||offline)']:.4f} nats apart" in report["answer"]
    assert f"wins {report['wins against offline']:.1%}" in report["answer"]


def test_the_checkpoint_is_the_online_policy(compared):
    folder, report = compared
    world = data.World("deterministic")
    logp = table(model.load(f"{folder}/ckpt.pt")[0], world)
    ref = table(model.load(f"{folder}/ref.pt")[0], world)
    assert data.kl(logp, ref).item() == pytest.approx(report["KL to the reference"], abs=1e-5)
    assert data.kl(logp, exact.nash(ref, world.pstar, 0.3)[0]) < 0.01


def test_a_reward_model_judges_in_the_place_of_the_truth(tmp_path, monkeypatch):
    """One that likes what is bad makes a policy that loses."""
    learned = online.table
    monkeypatch.setattr(online, "table", lambda *given: -learned(*given))
    report = finished(tmp_path, "--labels_by", "reward", "--pairs", "4000")
    assert report["KL to its exact answer"] < 0.02
    assert report["win rate"] < 0.45


@pytest.mark.parametrize("flags, why", [
    (["--data", "pairs.jsonl"], "invalid choice: 'pairs.jsonl'"),
    (["--b", "0.3"], "mixture"),
    (["--pairs_from", "mixture", "--b", "1"], "--b"),
    (["--pairs_from", "elsewhere"], "--pairs_from"),
    (["--pairs", "100"], "afresh"),
    (["--loss", "dpo"], "--loss"),
])
def test_bad_input_is_one_line(flags, why, tmp_path, capsys):
    assert start.main("online", online.run, ["--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("online: ")
    assert why in error and error.count("\n") == 1


def test_divergence_is_one_line(tmp_path, capsys):
    argv = ["--sft_steps", "1", "--lr", "1e9", "--steps", "30", "--out", str(tmp_path)]
    assert start.main("online", online.run, argv) == 1
    assert capsys.readouterr().err.count("\n") == 1
