"""Claims of lab/paper/sum_or_mean.py: where the mean leads, and what the table says."""
import json

import pytest
import torch

import data
import ipo
from lab.common import exact, start
from lab.paper import sum_or_mean


def random_logp(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)


@pytest.fixture(scope="module")
def world():
    return sum_or_mean.Long("bt")


def test_the_world_has_responses_of_one_to_seven_tokens(world):
    """2^0 + ... + 2^7 of them, all that a policy can say."""
    assert world.tokens.shape == (4, 255)
    assert set(world.tokens.flatten().tolist()) == set(range(1, 8))
    assert world.mu.sum(-1).tolist() == pytest.approx([1, 1, 1, 1])


def test_the_mean_leads_where_its_expected_loss_is_least():
    """LBFGS on ipo_loss of margins per token, over all pairs and coin flips."""
    ref = random_logp(1, 5)
    mu = random_logp(1, 5, seed=2).exp()
    length = torch.arange(1.0, 6.0).double()
    p = random_logp(1, 5, 5, seed=1).exp()
    p = p / (p + p.mT)
    certain = torch.ones((), dtype=torch.float64)

    def loss(logp):
        h = exact.margins(logp / length, ref / length)
        return exact.mean_over_pairs(p * ipo.ipo_loss(h, certain, 0.5), mu)

    fitted = exact.minimise(loss, ref)
    g = data.mean_over_opponents(p, mu)
    ours = sum_or_mean.mean_optimum(ref, g / 0.5, length[None])
    assert torch.allclose(fitted, ours, atol=1e-5)
    assert not torch.allclose(fitted, data.optimum(ref, p, mu, 0.5), atol=0.05)


def test_theory_s_example():
    """One token against four, the winner certain: .716 for the short one, .673 for the long one."""
    ref = torch.full((1, 2), 0.5).double().log()
    length = torch.tensor([[1.0, 4.0]]).double()
    g = torch.tensor([[0.75, 0.25]]).double()  # the short one wins
    short = sum_or_mean.mean_optimum(ref, g, length)
    long = sum_or_mean.mean_optimum(ref, g.flip(1), length)
    assert short.exp()[0, 0].item() == pytest.approx(0.716, abs=5e-4)
    assert long.exp()[0, 1].item() == pytest.approx(0.673, abs=5e-4)


def test_equal_lengths_only_rescale_tau(world):
    """If every response has 3 tokens, the mean at tau is the sum at tau / 3."""
    three = torch.full_like(world.ref, 3.0)
    ours = sum_or_mean.mean_optimum(world.ref, world.g / 0.9, three)
    assert torch.allclose(ours, data.optimum(world.ref, world.pstar, world.mu, 0.9 / 3), atol=1e-9)


def test_the_mean_s_answer_is_a_policy_elsewhere(world):
    own = sum_or_mean.mean_optimum(world.ref, world.g / 0.2, world.tokens)
    best = data.optimum(world.ref, world.pstar, world.mu, 0.2)
    assert own.logsumexp(-1).abs().max() < 1e-9
    assert data.kl(own, best) > 0.1


def test_pi_star_is_nearest_to_itself(world):
    best = data.optimum(world.ref, world.pstar, world.mu, 0.5)
    row = sum_or_mean.measured(best, 0.5, world)
    assert row["to pi*"] == pytest.approx(0, abs=1e-9)
    assert row["nearest tau"] == pytest.approx(0.5, rel=0.02)
    assert row["to that"] < 1e-3
    assert row["win"] == pytest.approx(row["best"], abs=1e-4)


def test_the_table_has_a_row_for_each_form_and_tau(tmp_path, capsys):
    sum_or_mean.run(["--tau", "0.3", "--mean_tau", "0.5", "--out", str(tmp_path)])
    table = json.loads((tmp_path / "report.json").read_text())["table"]
    assert list(table) == ["sum 0.3", "mean 0.5"]
    assert f"{table['mean 0.5']['to pi*']:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_the_readme_quotes_the_program(tmp_path, capsys, quoted):
    sum_or_mean.run(["--out", str(tmp_path)])
    _, _, *printed = capsys.readouterr().out.splitlines()
    assert printed == quoted["python -m lab.paper.sum_or_mean"]


BAD = [
    (["--loss", "dpo"], "--loss"),
    (["--data", "pairs.jsonl"], "invalid choice"),
    (["--mean_tau", "x"], "--mean_tau"),
    (["--mean_tau", "1", "1"], "1.0 is given twice"),
    (["--tau", "0"], "must be above 0"),
]


@pytest.mark.parametrize("flags, why", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, flags, why):
    assert start.main("sum_or_mean", sum_or_mean.run, [*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sum_or_mean: ") and error.count("\n") == 1
    assert why in error
