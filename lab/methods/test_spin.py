"""Claims of lab/methods/spin.py: which pairs are drawn, where a round and all rounds end."""
import json
from argparse import Namespace

import pytest
import torch
from torch.nn.functional import softplus

import data
from lab.common import exact, start
from lab.methods import spin

FAST = ["--steps", "200", "--sft_steps", "40", "--lr", "8e-3", "--log_every", "150", "--tau", "0.3",
        "--batch_size", "64", "--n_embd", "16"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Worlds with 13 responses."""
    monkeypatch.setattr(data.World.__init__, "__defaults__", (["superb", "dull", "hot"], (0, 1/4, 3/4)))


def two_policies(X=3, Y=5):
    torch.manual_seed(1)
    return torch.randn(2, X, Y, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("lam", [0.6, 1.0, 3.0])
def test_a_rounds_answer_minimises_the_exact_loss(lam):
    """LBFGS on the sum over all chosen and rejected responses."""
    p_data, opponent = two_policies()

    def loss(logp):
        h = exact.margins(logp, opponent)
        law = (p_data[:, :, None] + opponent[:, None, :]).exp()
        cost = law * softplus(-lam * h)
        return cost.sum((1, 2)).mean()

    found = exact.minimise(loss, opponent)
    assert data.kl(found, spin.answer(opponent, p_data, lam)) < 1e-10


@pytest.mark.parametrize("lam, converges", [(0.45, False), (0.55, True), (5, True)])
def test_rounds_converge_beyond_one_half(lam, converges):
    """60 exact rounds."""
    p_data, logp = two_policies()
    for _ in range(60):
        logp = spin.answer(logp, p_data, lam)
    assert (data.kl(p_data, logp) < 1e-6) == converges


def test_at_one_a_round_is_enough():
    p_data, logp = two_policies()
    assert torch.allclose(spin.answer(logp, p_data, 1.0), p_data)


def test_chosen_come_from_the_data_and_rejected_from_the_opponent():
    """10,000 pairs a prompt: shares within six deviations."""
    world = data.World("bt")
    p_data, opponent = two_policies(4, 13)
    args = Namespace(batch_size=40_000, steps=1)
    random = torch.Generator().manual_seed(0)
    batch, = spin.batches(world, p_data, opponent, args, random)
    tokens, _ = world.pairs.padded(torch.arange(52))
    number = {tuple(row): i for i, row in enumerate(tokens.tolist())}
    rows = torch.tensor([number[tuple(row)] for row in batch.tokens.tolist()])
    chosen, rejected = rows.chunk(2)
    for half, law in ((chosen, p_data.exp()), (rejected, opponent.exp())):
        shares = torch.bincount(half, minlength=52).view(4, 13) / 10_000
        off = (shares - law) / (law / 10_000).sqrt()
        assert off.abs().max() < 6
    assert torch.equal(chosen // 13, rejected // 13)
    assert torch.allclose(batch.ref_logp, opponent.flatten()[rows].float())
    assert (batch.p == 1).all()


def test_rounds_reach_what_exact_rounds_reach(tmp_path):
    """lambda 2: a round goes half of the way, in the exponent."""
    flags = ["--rounds", "2", "--lam", "2", "--out", str(tmp_path)]
    assert start.main("spin", spin.run, [*FAST, *flags]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after round 1"] == pytest.approx(report["  exact round 1"], abs=0.02)
    assert report["after round 2"] == pytest.approx(report["  exact round 2"], abs=0.02)
    assert report["  exact round 2"] < report["  exact round 1"] / 2
    assert f"is {report['after round 2']:.4f} nats" in report["answer"]
    assert report["KL(answer||pi)"] < 0.02


@pytest.mark.parametrize("flags, why", [
    (["--lam", "0"], "--lam"),
    (["--rounds", "0"], "--rounds"),
    (["--loss", "dpo"], "--loss"),
    (["--labels", "soft"], "--labels"),
    (["--data", "pairs.jsonl"], "invalid choice: 'pairs.jsonl'"),
])
def test_bad_input_is_one_line(flags, why, tmp_path, capsys):
    assert start.main("spin", spin.run, ["--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spin: ")
    assert why in error and error.count("\n") == 1


def test_divergence_is_one_line(tmp_path, capsys):
    argv = ["--sft_steps", "1", "--lr", "1e9", "--steps", "30", "--out", str(tmp_path)]
    assert start.main("spin", spin.run, argv) == 1
    assert capsys.readouterr().err.count("\n") == 1
