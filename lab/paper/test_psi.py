"""Claims of lab/paper/psi.py, each with its oracle."""
import json

import numpy as np
import pytest
import torch

import data
import ipo
import model
from lab.common import exact, pictures, start
from lab.paper import psi

SHORT = ["--steps", "20", "--sft_steps", "5", "--pairs", "3000", "--batch_size", "16", "--log_every", "10"]
GOLDEN = {  # targets in nats at p = .6, .75, .9, .99, 1, tau .1, computed by hand
    "identity": [1.00, 2.50, 4.00, 4.90, 5.00],
    "logit": [4.05, 10.99, 21.97, 45.95, None],
    "tanh": [6.64, 9.64, 9.97, 9.99, 9.99],
    "cubic": [0.08, 1.25, 5.12, 9.41, 10.00],
    "square": [1.00, 2.50, 4.00, 4.90, 5.00],
    "majority": [5.00, 5.00, 5.00, 5.00, 5.00],
}


def run(out, *flags):
    """The report of a run."""
    psi.run([*SHORT, *flags, "--out", str(out)])
    return json.loads((out / "report.json").read_text())


def weights(out):
    policy, _ = model.load(f"{out}/ckpt.pt")
    return torch.cat([p.flatten() for p in policy.parameters()])


def test_the_readme_s_card_has_what_tanh_asks_for(quoted, cells, monkeypatch):
    monkeypatch.setattr(ipo, "psi", psi.PSIS["tanh"])
    head, _, asked, *others = [cells(line) for line in quoted["python -m lab.paper.psi --psi tanh"]]
    assert head[1:] == [str(p) for p in psi.CARD]
    assert asked == ["target", *[f"{nats:.4f}" for nats in psi.asked(0.2)]]
    assert [row[0] for row in others] == ["labels", "reached"]


@pytest.mark.parametrize("name", psi.PSIS)
def test_the_card_says_what_a_pair_asks_for(name, monkeypatch):
    """(Psi(p) - Psi(1-p)) / (2 tau), by hand; a tie asks for 0."""
    monkeypatch.setattr(ipo, "psi", psi.PSIS[name])
    tie, *others = psi.asked(0.1)
    assert tie == 0
    assert others == pytest.approx(GOLDEN[name], abs=0.005)


def test_the_card_has_means_over_pairs(tmp_path):
    """A loop over all pairs with p near .75; no pair of bt is certain."""
    report = run(tmp_path, "--psi", "tanh", "--tau", "0.5")
    source = pictures.source_of(tmp_path)
    ratio = pictures.policy_of(tmp_path, source) - source.exact["ref"]
    near = ((source.pstar - 0.75).abs() < 0.004).nonzero().tolist()
    found = [(ratio[x, y] - ratio[x, z]).item() for x, y, z in near]
    assert report["card"]["reached"][2] == pytest.approx(np.mean(found), abs=1e-6)
    assert report["card"]["reached"][5] is None


def test_logit_s_labels_lead_to_what_they_ask_for(tmp_path):
    """Under Bradley-Terry logit's target is a difference of scores."""
    card = run(tmp_path, "--psi", "logit")["card"]
    assert card["labels"][1:5] == pytest.approx(card["target"][1:5], rel=0.04)


def test_a_psi_by_name_is_the_psi_in_ipo_py(tmp_path, monkeypatch):
    """cubic by name is ipo.py with psi = (2q-1)^3, bit for bit."""
    run(tmp_path / "name", "--psi", "cubic")
    monkeypatch.setattr(ipo, "psi", lambda q: (2 * q - 1) ** 3)
    ipo.run(ipo.parse([*SHORT, "--labels", "soft", "--out", str(tmp_path / "edit")]))
    assert torch.equal(weights(tmp_path / "name"), weights(tmp_path / "edit"))


def test_yours_is_what_ipo_py_has(tmp_path, monkeypatch):
    run(tmp_path / "name", "--psi", "cubic")
    monkeypatch.setattr(ipo, "psi", lambda q: (2 * q - 1) ** 3)
    run(tmp_path / "yours")
    assert torch.equal(weights(tmp_path / "name"), weights(tmp_path / "yours"))


def test_the_square_asks_for_what_the_identity_asks_for(tmp_path):
    """q^2 - (1-q)^2 = 2q - 1: the same policy, but for rounding of the targets."""
    run(tmp_path / "identity", "--psi", "identity")
    run(tmp_path / "square", "--psi", "square")
    assert torch.allclose(weights(tmp_path / "square"), weights(tmp_path / "identity"), atol=1e-4)


def test_the_square_s_pi_star_is_another_and_the_answer_says_so(tmp_path):
    answer = run(tmp_path, "--psi", "square")
    assert answer["kl_labels_opt"] > 0.005
    assert "nats: these labels lead elsewhere" in answer["answer"]


def test_the_identity_s_labels_lead_to_pi_star(tmp_path, capsys):
    answer = run(tmp_path, "--psi", "identity")["answer"]
    assert "KL(labels||pi*) 0.0000 nats: these labels lead to pi*" in answer
    assert f"{answer}\n  | margin in nats at p" in capsys.readouterr().out


LEAD = [("identity", "soft", True), ("identity", "hard", True), ("logit", "soft", True),
        ("cubic", "soft", True), ("cubic", "hard", False), ("square", "soft", False)]


@pytest.mark.parametrize("name, labels, there", LEAD)
def test_labels_lead_to_pi_star_if_psi_s_odd_part_suits_them(name, labels, there, monkeypatch):
    """In a world with a random reference."""
    monkeypatch.setattr(ipo, "psi", psi.PSIS[name])
    world = data.World("cyclic")
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(4, 400, dtype=torch.float64, generator=generator).log_softmax(-1)
    mu = torch.full_like(ref, 1 / 400)
    led = exact.limit(ref, world.pstar, mu, 0.2, labels)
    best = data.optimum(ref, ipo.psi(world.pstar), mu, 0.2)
    away = (led - best).abs().max().item()
    assert (away < 1e-6) == there


BAD = [
    (["--psi", "cube"], "invalid choice"),
    (["--loss", "dpo"], "--loss does nothing"),
    (["--data", "pairs.jsonl"], "invalid choice: 'pairs.jsonl'"),
    (["--tau", "-1"], "--tau is '-1'"),
    (["--psi", "logit", "--labels", "hard"], "infinite margin"),
]


@pytest.mark.parametrize("flags, why", BAD)
def test_bad_input_is_one_line_before_anything_runs(tmp_path, capsys, flags, why):
    assert start.main("psi", psi.run, [*SHORT, *flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("psi: ") and error.count("\n") == 1
    assert why in error
    assert not (tmp_path / "out").exists()
