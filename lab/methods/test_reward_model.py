"""Claims of lab/methods/reward_model.py: what the head reads, what is learned, what is refused."""
import json

import pytest
import torch

import data
import ipo
import model
from lab.common import start
from lab.methods import reward_model

FEW = ["--pairs", "4000", "--sft_steps", "5", "--steps", "100", "--batch_size", "64", "--n_embd", "16"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Worlds with 4 prompts x 4 responses."""
    monkeypatch.setattr(data.World.__init__, "__defaults__", (["good", "dull", "hot"], (0, 1)))


def finished(tmp_path, *flags):
    """report.json of a run."""
    out = f"{tmp_path}/out"
    argv = [*FEW, *flags, "--out", out, "--overwrite"]
    assert start.main("reward_model", reward_model.run, argv) == 0
    with open(f"{out}/report.json") as file:
        return json.load(file)


def untrained():
    """A reward model and its world, bt."""
    torch.manual_seed(0)
    world = data.World("bt")
    policy = model.GPT(model.GPTConfig(*world.sizes, n_layer=1, n_head=2, n_embd=32))
    return reward_model.RewardModel(policy), world


def test_padding_does_not_move_a_reward():
    """Each row alone, and all rows together."""
    reward, world = untrained()
    rows = torch.arange(16)
    together = reward(*world.pairs.padded(rows))
    alone = torch.cat([reward(*world.pairs.padded(row[None])) for row in rows])
    assert torch.allclose(alone, together, atol=1e-6)


def test_the_last_word_moves_a_reward():
    reward, world = untrained()
    rewards = reward_model.table(reward, world)
    assert (rewards[:, 1] - rewards[:, 2]).abs().min() > 1e-4


def test_soft_labels_teach_the_reward(tmp_path):
    """Rewards are .5 apart and more, so one that mixes up winner and loser is off by more than .5."""
    report = finished(tmp_path, "--labels", "soft", "--steps", "300")
    assert report["error, root mean square"] < 0.05


def test_hard_labels_teach_the_reward(tmp_path):
    report = finished(tmp_path, "--steps", "300", "--batch_size", "128")
    assert report["error, root mean square"] < 0.15


def test_the_answer_says_the_figures(tmp_path, capsys):
    report = finished(tmp_path)
    answer = report["answer"]
    assert f"{report['error, root mean square']:.3f} off" in answer
    assert f"{report['KL between best policies']:.4f} nats" in answer
    assert answer in capsys.readouterr().out


def test_certain_preferences_stretch_the_reward(tmp_path):
    """The span after 240 steps is more than 1.5 times that after 60."""
    short = finished(tmp_path, "--data", "deterministic", "--steps", "60")
    long = finished(tmp_path, "--data", "deterministic", "--steps", "240")
    assert long["span of its rewards"] > 1.5 * short["span of its rewards"]
    assert "no finite reward" in long["answer"]


def test_a_constant_of_a_prompt_is_no_error():
    """One reward of three is .3 off, beside constants: by hand."""
    reward = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    other = torch.tensor([[5.0, 6.0, 7.3], [2.0, 2.0, 2.0]])
    by_hand = (0.3 ** 2 * (4 + 1 + 1) / 9 / 6) ** 0.5
    assert reward_model.rmse(reward, other).item() == pytest.approx(by_hand, abs=1e-6)


def test_in_a_circle_the_likeliest_reward_stands_for_the_true_one(tmp_path):
    """Under it each response wins as often as it does, over all opponents."""
    args = ipo.parse(["--data", "cyclic", "--out", str(tmp_path), "--device", "cpu", *FEW])
    _, world = start.start(args)
    r = reward_model.taught(world)
    fit = (r[:, :, None] - r[:, None, :]).sigmoid()
    assert torch.allclose(fit.sum(-1), world.pstar.sum(-1), atol=1e-6)


def test_the_best_policy_has_the_greatest_objective():
    """E[r] - tau KL(pi||ref), against 200 policies near it."""
    torch.manual_seed(0)
    ref, r = torch.randn(2, 3, 5, dtype=torch.float64)
    ref = ref.log_softmax(-1)
    best = reward_model.best_policy(ref, r, 0.3)

    def objective(logp):
        return (logp.exp() * r).sum(-1).mean() - 0.3 * data.kl(logp, ref)

    for _ in range(200):
        other = (best + 0.1 * torch.randn_like(best)).log_softmax(-1)
        assert objective(other) < objective(best)


@pytest.mark.parametrize("flags, why", [
    (["--data", "pairs.jsonl"], "invalid choice: 'pairs.jsonl'"),
    (["--loss", "dpo"], "--loss"),
    (["--device", "cpu"], "--device"),
    (["--resume"], "--resume"),
    (["--steps", "0"], "--steps"),
])
def test_bad_input_is_one_line(flags, why, tmp_path, capsys):
    status = start.main("reward_model", reward_model.run, ["--out", str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("reward_model: ")
    assert why in error and error.count("\n") == 1


def test_divergence_is_one_line(tmp_path, capsys):
    argv = [*FEW, "--lr", "1e8", "--out", str(tmp_path)]
    assert start.main("reward_model", reward_model.run, argv) == 1
    assert capsys.readouterr().err.count("\n") == 1
