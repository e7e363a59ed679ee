"""Claims of lab/paper/sum_or_mean.py: where the mean leads, what is trained, what the table says."""
import copy
import json

import pytest
import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.paper import sum_or_mean

FAST = ["--steps", "3", "--sft_steps", "3", "--pairs", "300", "--batch_size", "32", "--log_every", "3"]


def random_logp(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)


@pytest.fixture
def posed():
    """A random policy as the reference, and the source with its pairs."""
    torch.manual_seed(0)
    args = ipo.parse(["--mu", "ref", *FAST])
    source = sum_or_mean.LongSource(args)
    policy = model.GPT(model.GPTConfig(*source.sizes, 1, 2, 8))
    for weight in policy.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    source.set_reference(ipo.score(policy, source.pairs, args))
    return policy, source


def test_the_world_has_responses_of_one_to_seven_tokens(posed):
    """2^0 + ... + 2^7 of them, all that a policy can say."""
    _, source = posed
    length = source.pairs.length - source.pairs.prompt_len
    assert source.reward.shape == (4, 255)
    assert set(length.tolist()) == set(range(1, 8))
    total = source.exact["ref"].exp().sum(-1)
    assert total.tolist() == pytest.approx([1, 1, 1, 1], abs=1e-5)


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
        return exact.expected(ipo.ipo_loss(h, certain, 0.5), p, mu)

    fitted = exact.minimise(loss, ref)
    asked = data.mean_over_opponents(ipo.target(p, 0.5), mu)
    ours = sum_or_mean.mean_optimum(ref, asked, length[None])
    assert torch.allclose(fitted, ours, atol=1e-5)
    assert not torch.allclose(fitted, data.optimum(ref, p, mu, 0.5), atol=0.05)


def test_equal_lengths_only_rescale_tau():
    """If every response has 3 tokens, the mean at tau is the sum at tau / 3."""
    world = data.World("bt")
    ref = random_logp(4, 400)
    mu = torch.full_like(ref, 1 / 400)
    asked = data.mean_over_opponents(world.pstar - 0.5, mu) / 0.9
    ours = sum_or_mean.mean_optimum(ref, asked, torch.full_like(ref, 3.0))
    assert torch.allclose(ours, data.optimum(ref, world.pstar, mu, 0.9 / 3), atol=1e-9)


def test_the_answer_of_the_sum_is_pi_star(posed):
    _, source = posed
    best = data.optimum(source.exact["ref"], source.pstar, source.mu, 0.2)
    assert torch.allclose(sum_or_mean.answer_of("sum", 0.2, source), best)


def test_the_answer_of_the_mean_is_a_policy_elsewhere(posed):
    _, source = posed
    own = sum_or_mean.answer_of("mean", 0.2, source)
    best = data.optimum(source.exact["ref"], source.pstar, source.mu, 0.2)
    assert own.logsumexp(-1).abs().max() < 1e-9
    assert data.kl(own, best) > 0.1


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_the_loop_trains_the_form(posed, form):
    """The first step, written out: the squared distance of the margin (per token) to 1/(2 tau)."""
    policy, source = posed
    other = copy.deepcopy(policy)
    source.args.steps = 1
    sum_or_mean.fit(policy, form, 0.2, source)
    batch = next(ipo.shuffled_batches(source, source.args))
    chosen, rejected = ipo.sequence_logp(other, batch.tokens, batch.mask).chunk(2)
    ref_chosen, ref_rejected = batch.ref_logp.chunk(2)
    first, second = batch.mask.sum(1).chunk(2) if form == "mean" else (1, 1)
    h = (chosen - ref_chosen) / first - (rejected - ref_rejected) / second
    ((h - 2.5) ** 2).mean().backward()
    ipo.optimizer_step(other, ipo.adam(other), 1, 1, source.args.lr)
    for ours, theirs in zip(policy.parameters(), other.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_pi_star_is_nearest_to_itself(posed):
    _, source = posed
    best = data.optimum(source.exact["ref"], source.pstar, source.mu, 0.5)
    row = sum_or_mean.measured(best, "sum", 0.5, source)
    assert row["nearest tau"] == pytest.approx(0.5, rel=0.02)
    assert row["to that"] < 1e-3
    assert row["win"] == pytest.approx(row["best"], abs=1e-4)


def test_the_table_has_a_row_for_each_form_and_tau(tmp_path, capsys):
    sum_or_mean.run(["--tau", "0.3", "--mean_tau", "0.5", "--out", str(tmp_path), *FAST])
    table = json.loads((tmp_path / "report.json").read_text())["table"]
    assert list(table) == ["sum 0.3", "mean 0.5"]
    assert f"{table['mean 0.5']['to own']:.4f}" in capsys.readouterr().out.splitlines()[-1]


BAD = [
    (["--loss", "dpo"], 2, "--loss does nothing"),
    (["--data", "pairs.jsonl"], 2, "only a world"),
    (["--mean_tau", "x"], 2, "--mean_tau"),
    (["--mean_tau", "1", "1"], 2, "1.0 is given twice"),
    (["--tau", "0"], 2, "must be above 0"),
    (["--lr", "1e9", *FAST, "--steps", "50"], 1, "not finite"),
]


@pytest.mark.parametrize("flags, status, why", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, flags, status, why):
    assert start.main("sum_or_mean", sum_or_mean.run, [*flags, "--out", str(tmp_path)]) == status
    error = capsys.readouterr().err
    assert error.startswith("sum_or_mean: ") and error.count("\n") == 1
    assert why in error
