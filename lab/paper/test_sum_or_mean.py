"""Claims of lab/paper/mean_form.py: where the mean form leads, what its report says, the nearest sum.
"""
import json

import pytest
import torch

import data
import ipo
import model
from lab.paper import mean_form

FAST = ["--steps", "3", "--sft_steps", "3", "--pairs", "300", "--batch_size", "32", "--log_every", "3"]


def random_logp(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def posed(out, *flags, form="mean", tau="0.2"):
    """The program's source for a small random policy, before training."""
    torch.manual_seed(0)
    argv = ["--data", "lengths", "--logp", form, "--tau", tau, "--pairs", "300", "--out", str(out), *flags]
    source = mean_form.Lengths(ipo.parse(argv))
    policy = model.GPT(model.GPTConfig(*source.sizes, 1, 4, 8))
    for weight in policy.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    source.pose(policy, None, torch.Generator().manual_seed(0))
    return source, policy


def test_the_world_has_responses_of_one_to_seven_tokens(tmp_path):
    """2^0 + ... + 2^7 of them, all that a policy can say; p* is Bradley-Terry's."""
    source, policy = posed(tmp_path)
    assert source.reward.shape == (4, 255) and set(source.length.unique().tolist()) == set(range(1, 8))
    _, mask = source.pairs.padded(torch.arange(4 * 255))
    assert torch.equal(mask.sum(1).view(4, 255), source.length)
    assert torch.allclose(source.ref.exp().sum(-1), torch.ones(4).double(), atol=1e-5)
    gap = source.reward[:, :, None] - source.reward[:, None, :]
    assert torch.allclose(source.pstar, gap.sigmoid(), atol=1e-4)


def test_the_mean_form_has_another_optimum():
    """Divided by lengths, log-ratios must still be a policy's, so the least squares' constant is not free.
    LBFGS on the expected loss, from ipo_loss alone, ends in ref exp(|y| (g/tau + c)); pi* is elsewhere."""
    ref, tau, length = random_logp(5), 0.5, torch.tensor([1.0, 2, 3, 4, 5]).double()
    p, mu = random_logp(5, 5, seed=1).exp(), random_logp(5, seed=2).exp()
    p = p / (p + p.T)
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        ratio = (theta.log_softmax(0) - ref) / length
        h = ratio[:, None] - ratio[None, :]
        value = (mu[:, None] * mu[None, :] * ipo.ipo_loss(h, p, tau)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    asked = (ipo.target(p, tau) * mu).sum(-1)
    fitted = theta.detach().softmax(0)
    ours = mean_form.mean_optimum(ref[None], asked[None], length[None])[0].exp()
    assert torch.allclose(fitted, ours, atol=1e-6)
    best = data.optimum(ref[None], p[None], mu[None], tau)[0].exp()
    assert not torch.allclose(fitted, best, atol=0.05)


def test_equal_lengths_only_rescale_tau():
    """If every response has L tokens, the mean at tau is the sum at tau / L."""
    world = data.World("lengths")
    ref, mu = random_logp(4, 255), torch.full((4, 255), 1 / 255).double()
    asked = ((world.pstar - 0.5) * mu[:, None, :]).sum(-1) / 0.9
    ours = mean_form.mean_optimum(ref, asked, torch.full((4, 255), 3.0).double())
    assert torch.allclose(ours, data.optimum(ref, world.pstar, mu, 0.9 / 3), atol=1e-9)


@pytest.mark.parametrize("flags", [["--labels", "soft"], ["--mu", "ref"], ["--noise", "0.2"]])
def test_the_fixed_point_in_a_world(tmp_path, flags):
    """Normalised, and the log-ratio per token is E_mu of what labels ask for, up to a constant."""
    source, _ = posed(tmp_path, *flags)
    own, noise = source.exact["labels"], 0.2 if "--noise" in flags else 0.0
    asked = (source.pstar - 0.5) * (1 - 2 * noise) / 0.2
    left = (own - source.ref) / source.length - (asked * source.mu[:, None, :]).sum(-1)
    assert own.logsumexp(-1).abs().max() < 1e-9 and left.std(-1).max() < 1e-6
    assert data.kl(own, source.exact["opt"]) > 0.1
    same, _ = posed(tmp_path, *flags, form="sum")
    assert torch.allclose(same.exact["labels"].exp().sum(-1), torch.ones(4).double())
    assert noise or data.kl(same.exact["labels"], same.exact["opt"]) < 1e-6


def test_the_report_measures_the_loss_that_is_trained(tmp_path):
    """Loss and margin of all pairs from sequence_logp of each form, for another policy than the reference."""
    for form in ("sum", "mean"):
        source, policy = posed(tmp_path, form=form)
        tokens, mask = source.pairs.padded(source.pairs.pair_rows(source.train))
        with torch.no_grad():
            before = ipo.sequence_logp(policy, tokens, mask, form == "mean")
            for weight in policy.parameters():
                weight.normal_()
            h = ipo.margin(ipo.sequence_logp(policy, tokens, mask, form == "mean"), before)
            numbers = source.evaluate(policy)
        assert numbers["loss"] == pytest.approx(((h - 2.5) ** 2).mean().item(), rel=1e-4)
        assert numbers["h"] == pytest.approx(h.mean().item(), abs=1e-4) and abs(numbers["h"]) > 0.01


def test_no_policy_beats_the_best_win_rate(tmp_path):
    """pi* of tau .5 is nearest to itself and wins as much as the best of its KL; others win no more."""
    source, _ = posed(tmp_path)
    best = data.optimum(source.ref, source.pstar, source.mu, 0.5)
    row = mean_form.against_sums(source, best)
    own = data.exact(best, source.ref, {}, source.pstar, source.mu, ipo.psi, 1.0)
    assert row["nearest tau"] == pytest.approx(0.5, rel=0.02) and row["to that"] < 1e-3
    assert row["best win"] == pytest.approx(own["win"], abs=1e-4)
    others = [(0.7 * source.ref + 0.3 * random_logp(4, 255)).log_softmax(-1), source.exact["labels"]]
    others += [data.optimum(source.ref, (source.pstar > 0.5).double(), source.mu, tau) for tau in (0.3, 2)]
    for other in others:
        numbers = data.exact(other, source.ref, {}, source.pstar, source.mu, ipo.psi, 1.0)
        assert numbers["win"] < mean_form.against_sums(source, other)["best win"] + 1e-4


def test_the_table_is_made_of_runs(tmp_path, capsys):
    """A row per run; its cells are that run's report."""
    assert mean_form.main(["--tau", "0.3", "--mean_tau", "0.5", "--out", str(tmp_path / "t"), *FAST]) == 0
    table, report = capsys.readouterr().out, json.loads((tmp_path / "t/report.json").read_text())
    assert list(report) == ["sum-0.3", "mean-0.5"]
    for name, row in report.items():
        run = json.loads((tmp_path / f"t/{name}/report.json").read_text())
        config = json.loads((tmp_path / f"t/{name}/config.json").read_text())
        assert [config["logp"], str(config["tau"])] == name.split("-") and config["mu"] == "ref"
        assert row["to pi*"] == run["after"]["kl_opt"] and row["to own"] == run["after"]["kl_labels"]
        assert row["own to pi*"] == run["labels"]["kl_opt"] and f"{row['to own']:.4f}" in table
    assert report["sum-0.3"]["own to pi*"] < 1e-6 < 0.1 < report["mean-0.5"]["own to pi*"]


def test_bad_input_is_one_line(tmp_path, capsys):
    """Status 2, and nothing is written; a run that diverges: status 1."""
    for bad in (["--loss", "dpo"], ["--data", "pairs.jsonl"], ["--mean_tau", "x"], ["--steps", "0"]):
        assert mean_form.main([*bad, "--out", str(tmp_path / "t")]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "t").exists()
    assert mean_form.main(["--lr", "1e9", *FAST, "--steps", "50", "--out", str(tmp_path / "t")]) == 1
    assert "not finite" in capsys.readouterr().err
