"""The claims of lab/methods/minimiser.py: against eq. 7, sums by hand, and short runs in a world of four responses."""
import json
from argparse import Namespace

import pytest
import torch

import data
import ipo
from lab.common import exact
from lab.methods import minimiser

pytestmark = pytest.mark.usefixtures("bt3")


def small(seed=0):
    """A random world of 2 x 4 responses, of 1 to 4 tokens after a prompt of 2."""
    generator = torch.Generator().manual_seed(seed)
    gap = 2 * torch.randn(2, 4, dtype=torch.float64, generator=generator)
    ref, mu = torch.randn(2, 2, 4, dtype=torch.float64, generator=generator).log_softmax(-1)
    length = torch.tensor([1, 2, 3, 4] * 2)
    pairs = Namespace(start=torch.cat([torch.zeros(1, dtype=int), (length + 2).cumsum(0)]),
                      prompt_len=torch.full((8,), 2))
    pstar = (gap[:, :, None] - gap[:, None, :]).sigmoid()
    return Namespace(pstar=pstar, ref=ref, mu=mu.exp(), pairs=pairs), length.view(2, 4)


def flags(**own):
    return Namespace(**({"loss": "ipo", "tau": 0.3, "labels": "hard", "noise": 0.0, "logp": "sum"} | own))


@pytest.mark.parametrize("own, worth", [
    ({}, lambda p: p), ({"labels": "soft"}, lambda p: p), ({"loss": "dpo"}, torch.logit),
    ({"noise": 0.2}, lambda p: p + 0.2 * (1 - 2 * p)), ({"loss": "dpo", "labels": "soft"}, torch.logit),
    ({"noise": 0.2, "labels": "soft"}, lambda p: p + 0.2 * (1 - 2 * p)), ({"loss": "rebel", "labels": "soft"}, torch.logit)])
def test_losses_with_a_link_have_eq_7s_optimum(own, worth):
    """The minimiser of the exact mean is pi* of Psi = link, of the labels as they are flipped."""
    world, _ = small()
    args = flags(**own)
    best = exact.minimise(minimiser.expectation(args, world), world.ref)
    assert torch.allclose(best, data.optimum(world.ref, worth(world.pstar), world.mu, args.tau), atol=1e-5)


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("loss, more", [("ipo", {"logp": "mean"}), ("simpo", {"logp": "mean", "gamma": 0.4}),
                                        ("robust", {"label_noise": 0.2})])
def test_the_mean_is_a_sum_over_pairs(loss, more, labels):
    """Four nested loops, the loss of one pair and label at a time, lengths and flags included."""
    world, length = small(1)
    args = flags(loss=loss, labels=labels, noise=0.1, **more)
    logp = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    f = ipo.LOSSES[loss]
    own = {key: value for key, value in more.items() if key != "logp"}
    total, weight = 0.0, torch.zeros(2, dtype=torch.float64)
    for x in range(2):
        of_prompt = 0.0
        for y in range(4):
            for other in set(range(4)) - {y}:
                scale = length[x, y].item(), length[x, other].item()
                scale = scale if "logp" in more else (1, 1)
                ref = world.ref[x] * (loss != "simpo")
                h = (logp[x, y] - ref[y]) / scale[0] - (logp[x, other] - ref[other]) / scale[1]
                q = 0.9 * world.pstar[x, y, other] + 0.1 * world.pstar[x, other, y]
                pair = world.mu[x, y] * world.mu[x, other]
                cost = f(h, q, args.tau, **own)
                if labels == "hard":
                    cost = q * f(h, torch.ones(()), args.tau, **own)
                    cost = cost + (1 - q) * f(-h, torch.ones(()), args.tau, **own)
                of_prompt, weight[x] = of_prompt + pair * cost, weight[x] + pair
        total = total + of_prompt / weight[x] / 2
    assert torch.allclose(minimiser.expectation(args, world)(logp), total)


def test_runs_are_read_and_compared(tmp_path, capsys):
    """IPO ends near its minimiser, which is its report's pi*; an untrained policy is as far as that says; dpo on
    certain pairs has none; a run of another program is named and skipped."""
    for name, own in {"ipo": ["--steps", "400"], "start": ["--steps", "1", "--lr", "1e-9"],
                      "dpo": ["--steps", "1", "--loss", "dpo", "--labels", "soft"]}.items():
        assert ipo.main(["--data", "bt3", "--tau", "0.5", "--pairs", "20000", "--lr", "5e-3", "--sft_steps", "20",
                         "--device", "cpu", "--out", f"{tmp_path}/{name}", *own]) == 0
    report = json.loads((tmp_path / "start/report.json").read_text())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/report.json").write_text("{}")
    config = json.loads((tmp_path / "ipo/config.json").read_text())
    (tmp_path / "foreign/config.json").write_text(json.dumps(config | {"method": "cpo"}))
    assert minimiser.main([str(tmp_path), "--out", f"{tmp_path}/out"]) == 0
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert set(found) == {"ipo", "start", "dpo"} and "foreign: skipped" in capsys.readouterr().out
    assert found["start"]["kl"] == pytest.approx(report["after"]["kl_opt"], abs=1e-4)
    assert found["ipo"]["kl"] < found["start"]["kl"] / 5 and 0 <= found["ipo"]["gap"] < found["start"]["gap"]
    assert minimiser.main([f"{tmp_path}/nowhere", "--out", f"{tmp_path}/out"]) == 2


def test_what_falls_without_end_has_no_minimiser(monkeypatch):
    """Certain pairs, dpo: the margin grows as long as LBFGS goes on, far past any finite answer."""
    world, _ = small()
    world.pstar = (world.pstar > 0.5).double() + torch.eye(4) / 2
    monkeypatch.setattr(minimiser, "read", lambda folder: (flags(loss="dpo", tau=0.01), world, world.ref))
    assert minimiser.answer(None, 500)["kl"] is None
