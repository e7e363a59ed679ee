"""Claims of lab/methods/rlhf.py, against enumeration, closed forms and sums over all draws."""
import itertools
import json
from argparse import Namespace

import pytest
import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.methods import reward_model, rlhf

FEW = ["--sft_steps", "20", "--steps", "300", "--log_every", "100", "--n_embd", "16"]
PAIRS = ["--pairs", "4000", "--batch_size", "48"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Worlds with 4 prompts x 4 responses."""
    monkeypatch.setattr(data.World.__init__, "__defaults__", (["good", "dull", "hot"], (0, 1)))


def finished(tmp_path, *flags):
    """report.json of a run."""
    argv = [*FEW, "--tau", "0.5", *flags, "--out", str(tmp_path)]
    assert start.main("rlhf", rlhf.run, argv) == 0
    return json.loads((tmp_path / "report.json").read_text())


def case(**own):
    """Logits, the reference and rewards of one prompt with three responses, and flags."""
    torch.manual_seed(3)
    theta, ref, r = torch.randn(3, 1, 3, dtype=torch.float64)
    args = Namespace(**{"tau": 0.3, "kl": "reward", "k": 3, **own})
    return theta.requires_grad_(), ref.log_softmax(-1), r, args


def mean_gradient(theta, ref, r, args):
    """Of rlhf.loss: over every k-tuple of draws, times its probability."""
    total = torch.zeros_like(theta)
    for draw in itertools.product(range(3), repeat=args.k):
        y = torch.tensor([draw])
        logp = theta.log_softmax(-1).gather(1, y)
        loss = rlhf.loss(logp, ref.gather(1, y), r.gather(1, y), args)
        gradient, = torch.autograd.grad(loss, theta, retain_graph=True)
        total += logp.sum().exp().detach() * gradient
    return total


@pytest.mark.parametrize("kl", ["reward", "k3"])
@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_gradient_is_that_of_the_objective(kl, k):
    """reward: E r - tau KL(pi||ref). k3: E r - tau KL(ref||pi)."""
    theta, ref, r, args = case(k=k, kl=kl)
    logp = theta.log_softmax(-1)
    penalty = {"reward": data.kl(logp, ref), "k3": data.kl(ref, logp)}[kl]
    objective = (logp.exp() * r).sum() - args.tau * penalty
    gradient, = torch.autograd.grad(objective, theta, retain_graph=True)
    assert torch.allclose(mean_gradient(theta, ref, r, args), -gradient, atol=1e-12)


def test_the_baseline_leaves_the_sample_out():
    value = torch.tensor([[1.0, 2.0, 6.0]])
    assert rlhf.baseline(value).tolist() == [[4.0, 3.5, 1.5]]


@pytest.mark.parametrize("kl", ["reward", "k3"])
def test_the_answer_maximises_its_objective(kl):
    """LBFGS on the objective, from elsewhere."""
    theta, ref, r, args = case(kl=kl)

    def lost(logp):
        penalty = data.kl(logp, ref) if kl == "reward" else data.kl(ref, logp)
        return args.tau * penalty - (logp.exp() * r).sum(-1).mean()

    found = exact.minimise(lost, theta.detach())
    assert torch.allclose(rlhf.answer(ref, r, args), found, atol=1e-5)


def test_training_ends_at_the_exact_answer(tmp_path):
    """KL to ref exp(r/tau) / Z, from the files of the run."""
    report = finished(tmp_path)
    world = data.World("bt")
    table = exact.Table(world)
    with torch.no_grad():
        logp = table(model.load(f"{tmp_path}/ckpt.pt")[0]).double()
        ref = table(model.load(f"{tmp_path}/ref.pt")[0]).double()
    answer = (ref + world.reward / 0.5).log_softmax(-1)
    kl = data.kl(logp, answer).item()
    assert kl < 3e-3
    assert data.kl(ref, answer) > 0.05
    assert kl == pytest.approx(report["KL to ref exp(r/tau)/Z"], abs=1e-5)
    assert data.kl(logp, ref).item() == pytest.approx(report["KL to the reference"], abs=1e-5)


def test_k3_ends_at_another_answer(tmp_path):
    report = finished(tmp_path, "--kl", "k3")
    assert report["KL to its exact answer"] < 1e-3
    assert report["KL to ref exp(r/tau)/Z"] > 0.01
    assert "k3" in report["answer"]


def test_draws_come_from_the_policy(tmp_path, monkeypatch):
    """The mean reward of 40,000 draws of the first step is that of the reference."""
    drawn, loss = [], rlhf.loss

    def seen(logp, ref_logp, reward, args):
        drawn.append(reward.mean(1))
        return loss(logp, ref_logp, reward, args)

    monkeypatch.setattr(rlhf, "loss", seen)
    finished(tmp_path, "--steps", "1", "--k", "40000")
    world = data.World("bt")
    with torch.no_grad():
        ref = exact.Table(world)(model.load(f"{tmp_path}/ref.pt")[0]).exp()
    assert torch.allclose(drawn[0], (ref * world.reward).sum(-1), atol=0.01)


def test_compare_maximises_the_learned_reward(tmp_path, monkeypatch):
    """One that likes what is bad leads RLHF away from the others."""
    table = reward_model.table
    monkeypatch.setattr(rlhf, "table", lambda *given: -table(*given))
    report = finished(tmp_path, "--compare", *PAIRS, "--steps", "150", "--lr", "5e-3")
    assert report["RLHF, exact"] > 0.2
    assert report["DPO, exact"] < 0.01


def test_three_ways_lead_to_one_policy(tmp_path):
    """Proposition 1 in small. No figure is 0, so no policy is another's copy."""
    report = finished(tmp_path, "--compare", *PAIRS)
    figures = [value for name, value in report.items() if ", " in name]
    assert len(figures) == 6
    assert max(figures) < 2e-3
    assert min(figures) > 0


def test_the_loss_of_logit_is_ipo_with_that_psi(monkeypatch):
    monkeypatch.setattr(ipo, "psi", torch.logit)
    h, p = torch.tensor([0.3, -2.0]), torch.tensor([0.8, 0.1])
    assert torch.allclose(rlhf.rebel(h, p, 0.5), ipo.ipo_loss(h, p, 0.5))


@pytest.mark.parametrize("flags, why", [
    (["--k", "1"], "--k"),
    (["--kl", "k4"], "--kl"),
    (["--tau", "-1"], "--tau"),
    (["--loss", "dpo"], "--loss"),
    (["--data", "pairs.jsonl"], "invalid choice: 'pairs.jsonl'"),
    (["--pairs", "5"], "--compare"),
    (["--compare", "--labels", "hard"], "--labels does nothing"),
    (["--compare", "--data", "cyclic"], "--compare"),
    (["--compare", "--kl", "k3"], "--compare"),
])
def test_bad_input_is_one_line(flags, why, tmp_path, capsys):
    assert start.main("rlhf", rlhf.run, ["--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlhf: ")
    assert why in error and error.count("\n") == 1


def test_divergence_is_one_line(tmp_path, capsys):
    argv = [*FEW, "--lr", "1e8", "--out", str(tmp_path)]
    assert start.main("rlhf", rlhf.run, argv) == 1
    assert capsys.readouterr().err.count("\n") == 1
