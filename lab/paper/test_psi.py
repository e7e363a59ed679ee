"""Claims of lab/paper/psi.py, each with its oracle."""
import json

import numpy as np
import pytest
import torch

import ipo
import model
from lab.common import pictures
from lab.paper import psi

SHORT = ["--steps", "20", "--sft_steps", "5", "--pairs", "3000", "--batch_size", "16", "--log_every", "10"]


def run(out, *flags):
    """The report of a run of lab.paper.psi that succeeded."""
    assert psi.main([*SHORT, *flags, "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


def weights(out):
    return torch.cat([p.flatten() for p in model.load(f"{out}/ckpt.pt")[0].parameters()])


GOLDEN = {  # targets in nats at p = .6, .75, .9, .99, 1, tau .1, computed by hand
    "identity": [1.00, 2.50, 4.00, 4.90, 5.00],
    "logit": [4.05, 10.99, 21.97, 45.95, None],
    "tanh": [6.64, 9.64, 9.97, 9.99, 9.99],
    "cubic": [0.08, 1.25, 5.12, 9.41, 10.00],
    "square": [1.00, 2.50, 4.00, 4.90, 5.00],
    "majority": [5.00, 5.00, 5.00, 5.00, 5.00],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_card_says_what_a_pair_asks_for(name, monkeypatch):
    """(Psi(p) - Psi(1-p)) / (2 tau), by hand; a tie asks for 0."""
    monkeypatch.setattr(ipo, "psi", psi.PSIS[name])
    target = psi.card(0.1)["target"]
    assert target[0] == 0 and target[1:] == pytest.approx(GOLDEN[name], abs=0.005)
    assert GOLDEN.keys() == psi.PSIS.keys()


def test_margins_and_their_means_are_those_of_the_pairs(tmp_path, figures, capsys, monkeypatch):
    """A loop over the pairs gives the card's rows, which are printed; where no pair is, nothing is claimed."""
    report = run(tmp_path, "--psi", "logit", "--tau", "0.5")
    monkeypatch.setattr(ipo, "psi", torch.logit)  # pi* of the source is that of the Psi that stands here
    source, policy = pictures.source_of(tmp_path), model.load(f"{tmp_path}/ckpt.pt")[0]
    logp, pairs = source.enumerate(policy), source.pairs
    ratio, best = (logp - source.ref).flatten(), (source.exact["opt"] - source.ref).flatten()
    card = report["card"]
    for i, p in enumerate(card["p"]):
        near = [n for n in range(3000) if abs(pairs.p[n] - p) < 0.004]
        for name, value in {"reached": ratio, "labels": best}.items():
            loop = [(value[pairs.chosen[n]] - value[pairs.rejected[n]]).item() for n in near]
            assert card[name][i] == (pytest.approx(np.mean(loop)) if near else None)
    assert card["reached"][5] is None and card["target"][5] is None  # bt is never certain
    # under Bradley-Terry logit's target is a difference of scores: the labels' margins are what is asked
    assert card["labels"][1:5] == pytest.approx(card["target"][1:5], rel=0.04)
    shown = "".join(f"{ipo.show(value):>9}" for value in card["reached"])
    assert f"reached   {shown}\n" in capsys.readouterr().out


def test_the_named_psi_is_trained_and_then_put_back(tmp_path, figures):
    """cubic by name is ipo.py with psi = (2q-1)^3, bit for bit; another name gives another policy."""
    before = ipo.psi
    report = run(tmp_path / "name", "--psi", "cubic")
    assert ipo.psi is before and json.loads((tmp_path / "name/config.json").read_text())["labels"] == "soft"
    run(tmp_path / "yours")
    ipo.psi = lambda q: (2 * q - 1) ** 3
    assert ipo.main([*SHORT, "--labels", "soft", "--out", str(tmp_path / "edit")]) == 0
    edited = run(tmp_path / "edited")  # the default is what ipo.py holds
    ipo.psi = before
    assert torch.equal(weights(tmp_path / "name"), weights(tmp_path / "edit"))
    assert torch.equal(weights(tmp_path / "edited"), weights(tmp_path / "edit"))
    assert not torch.equal(weights(tmp_path / "name"), weights(tmp_path / "yours"))
    assert report["after"] == edited["after"] and report["card"] == edited["card"]


def test_the_square_asks_for_what_the_identity_asks_for(tmp_path, figures, capsys):
    """q^2 - (1-q)^2 = 2q - 1: the same policy, but square's pi* is another; the last line says why."""
    identity = run(tmp_path / "identity", "--psi", "identity")
    assert "KL(labels||pi*) 0.0000 nats: these labels lead to pi*\n" in capsys.readouterr().out
    square = run(tmp_path / "square", "--psi", "square")
    away = square["labels"]["kl_opt"]
    assert f"KL(labels||pi*) {away:.4f} nats: Psi(q) + Psi(1-q) is not constant" in capsys.readouterr().out
    # equal but for rounding of targets
    assert torch.allclose(weights(tmp_path / "square"), weights(tmp_path / "identity"), atol=1e-4)
    assert square["after"]["kl_labels"] == pytest.approx(identity["after"]["kl_opt"], abs=1e-5)
    assert away > 0.005 and identity["labels"]["kl_opt"] < 1e-9


KINDS = [("soft", 0), ("hard", 0), ("soft", 0.1), ("hard", 0.1)]
REFUSED = [("logit", "hard", 0), ("logit", "hard", 0.1)]  # their target is infinite
POSED = [(name, *kind) for name in psi.PSIS for kind in KINDS if (name, *kind) not in REFUSED]


@pytest.mark.parametrize("name, labels, noise", POSED)
def test_a_reason_is_given_just_when_labels_lead_elsewhere(name, labels, noise, monkeypatch):
    """In a world with a random reference: labels and pi* differ if and only if there is a reason."""
    monkeypatch.setattr(ipo, "psi", psi.PSIS[name])
    args = ipo.parse(["--labels", labels, "--noise", str(noise), "--pairs", "10", "--data", "cyclic"])
    source = ipo.WorldSource(args)
    ref = torch.randn(4, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    monkeypatch.setattr(source, "enumerate", lambda policy: ref)
    source.pose(None, None, torch.Generator().manual_seed(0))
    away = (source.exact["labels"] - source.exact["opt"]).abs().max().item()
    assert bool(psi.reasons(args)) == (away > 1e-6), (psi.reasons(args), away)


def test_the_picture_shows_targets_and_what_was_reached(tmp_path, figures):
    """A curve of targets for every Psi; the dots are means over the pairs with that p."""
    run(tmp_path, "--psi", "tanh")
    lines = {line.get_label(): line.get_data() for line in figures[f"{tmp_path}/psi.png"].axes[0].lines}
    assert lines.keys() == {*psi.PSIS, "reached: tanh"}
    assert lines["tanh"][1] == pytest.approx(np.tanh(8 * (lines["tanh"][0] - 0.5)) / 0.2, abs=1e-4)
    assert lines["cubic"][1] == pytest.approx((2 * lines["cubic"][0] - 1) ** 3 / 0.2, abs=1e-4)
    source, policy = pictures.source_of(tmp_path), model.load(f"{tmp_path}/ckpt.pt")[0]
    h = psi.margins(source, source.enumerate(policy))
    at = lines["reached: tanh"][0][7]
    assert lines["reached: tanh"][1][7] == pytest.approx(h[source.pairs.p == at].mean().item())


def test_a_folder_with_a_picture_and_a_report(tmp_path):
    """psi.png is a PNG."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    run(tmp_path, "--psi", "majority")
    assert (tmp_path / "psi.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_ends_in_a_line(tmp_path, capsys):
    """Exit status 2, psi put back, no folder made."""
    before = ipo.psi
    for flags in (["--psi", "cube"], ["--loss", "dpo"], ["--logp", "mean"], ["--data", "pairs.jsonl"],
                  ["--tau", "-1"], ["--sample", "review"], ["--nope"]):
        assert psi.main([*SHORT, *flags, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("psi.py: ") and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert psi.main([*SHORT, "--psi", "logit", "--labels", "hard", "--out", str(tmp_path / "out")]) == 2
    assert "infinite margin" in capsys.readouterr().err and ipo.psi is before
