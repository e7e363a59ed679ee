"""Claims of lab/identify.py: losses whose answer is known are named, and what fits nothing is not.
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F

from lab import askable, identify

SOURCE = '''
import torch, torch.nn.functional as F
def h_of(c, r, rc, rr): return (c - rc) - (r - rr)
def ipo(c, r, rc, rr, beta=0.1): return (h_of(c, r, rc, rr) - 1 / (2 * beta)) ** 2
def ipo_mean(c, r, rc, rr, beta=0.1): return ((h_of(c, r, rc, rr) - 1 / (2 * beta)) ** 2).mean()
def misread(c, r, rc, rr, beta=0.1): return (beta * h_of(c, r, rc, rr) - 1 / (2 * beta)) ** 2
def scaled(h, beta=0.1): return (beta * h - 0.5) ** 2
def twice(h, beta=0.1): return 2 * (h - 1 / (2 * beta)) ** 2
def sigmoid(c, r, rc, rr, beta=0.1): return -F.logsigmoid(beta * h_of(c, r, rc, rr)), None, None
def hinge(h, beta=0.5): return F.relu(1 - beta * h)
def squared_hinge(h, beta=0.5): return F.relu(1 - beta * h) ** 2
def exponential(h, beta=0.2): return torch.exp(-beta * h)
def savage(h, beta=0.5): return torch.sigmoid(-beta * h) ** 2
def flipped(h): return -F.logsigmoid(-0.1 * h)
def no_reference(c, r, rc, rr): return -F.logsigmoid(0.1 * (c - r))
def wave(h): return torch.sin(h)
def nan_at_0(h): return torch.where(h == 0, torch.nan, (h - 5) ** 2)
def soft(h, p, tau): return (h - (p - 0.5) / tau) ** 2
def hard(h, p, tau): return (h - 0.5 / tau) ** 2
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("identify") / "losses_of_mine.py"
    path.write_text(SOURCE)
    return path


def look(file, name, tau=0.1):
    torch.manual_seed(0)
    return identify.examine(askable.Loss(askable.load(f"{file}:{name}"), "", tau), tau)


@pytest.mark.parametrize("name, verdict, tau, stops, link", [
    ("ipo", "ipo", 0.1, 5, "identity"), ("ipo_mean", "ipo", 0.1, 5, "identity"),
    ("misread", "ipo scaled", 0.01, 50, "identity"), ("scaled", "ipo scaled", 0.1, 5, "identity"),
    ("twice", "ipo scaled", 0.1, 5, "identity"), ("sigmoid", "dpo", 0.1, None, "logit"),
    ("hinge", "hinge", 0.5, 2, "sign"), ("squared_hinge", "squared hinge", 0.5, 2, "identity"),
    ("exponential", "exponential", 0.2, None, "logit"), ("savage", "savage", 0.5, None, "logit"),
    ("soft", "ipo", 0.1, 5, "identity"), ("hard", "ipo", 0.1, 5, "identity")])
def test_known_losses_are_named(file, name, verdict, tau, stops, link):
    """Worked out by hand: target, beta, and the minimiser of p f(h) + (1-p) f(-h)."""
    report = look(file, name)
    assert report["margin_only"] and report["sign"] == "right"
    assert report["verdict"] == verdict and report["tau"] == pytest.approx(tau, rel=1e-6)
    assert report["link"] == link
    assert report["stops_at"] == (stops if stops is None else pytest.approx(stops, abs=0.1))


def test_nothing_is_guessed(file):
    """A wave fits no family, and a loss without reference is no function of h."""
    assert look(file, "wave")["verdict"] == "none"
    assert look(file, "nan_at_0")["verdict"] == "none"
    assert not look(file, "no_reference")["margin_only"]


def test_a_wrong_sign_is_named(file):
    """-log s(-beta h) pushes the chosen response down: its slope at 0 is positive."""
    report = look(file, "flipped")
    assert report["slope_at_0"] == pytest.approx(0.05) and report["sign"].startswith("wrong")


def test_soft_labels_are_honoured_or_ignored(file):
    """One of two losses of (h, p, tau) reads p."""
    assert look(file, "soft")["soft_labels"] == "honoured"
    assert look(file, "hard")["soft_labels"] == "ignored"


def test_overflow_is_seen(file):
    """exp(.2 x 10^4) overflows in float32; a square does not."""
    assert not look(file, "exponential")["finite_float32"]
    assert look(file, "ipo")["finite_float32"] and not look(file, "nan_at_0")["finite_float32"]


def test_the_minimiser_in_a_world_is_pi_star(file):
    """IPO's exact minimiser in bt is pi* of the identity at its own tau (eq. 7), DPO's that of logit."""
    loss = askable.Loss(askable.load(f"{file}:ipo"), "beta", 0.1)
    assert identify.nearest(loss, "bt")["identity"] == {"tau": 0.1, "kl": pytest.approx(0, abs=1e-4)}
    loss = askable.Loss(askable.load(f"{file}:sigmoid"), "beta", 0.1)
    assert identify.nearest(loss, "bt")["logit"] == {"tau": 0.1, "kl": pytest.approx(0, abs=1e-4)}


def test_the_command(file, tmp_path, capsys):
    """One screen or one object; the keyword's own default is the tau; what cannot be asked ends in one line."""
    out = ["--out", str(tmp_path / "o")]
    assert identify.main([f"{file}:misread", "--tau", "beta", *out]) == 0
    assert "it asks for 50 nats, eq. 17 at the tau named for 5" in capsys.readouterr().out
    assert identify.main([f"{file}:ipo", "--tau", "beta=0.5", "--json", *out]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "ipo" and math.isclose(report["tau"], 0.5, rel_tol=1e-6)
    for bad in (f"{file}:nothing", "no_such_module:f", "json:dumps"):
        assert identify.main([bad, *out]) == 2
        assert capsys.readouterr().err.count("\n") == 1
