"""The page of lab/course/page.py: all its cells without a browser, and what it leaves behind.
"""
import functools
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("marimo", reason="lab/requirements.txt: the page needs marimo")
pytest.importorskip("matplotlib", reason="lab/requirements.txt: the page needs matplotlib")

import data
import ipo
from lab.common import exact
from lab.course import page

HERE = Path(ipo.__file__).parent
CONTROLS = {
    "kind": page.PSI["q (IPO)"],
    "tau": 0.2,
    "place": "bt",
    "labels": "hard",
}


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Worlds with 13 responses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.World.__init__, "__defaults__", (["superb", "dull", "hot"], (0, 1/4, 3/4)))
        yield


@functools.cache
def opened(**values):
    """(text, definitions) of the app's cells with the controls at these values. Nobody changes them."""
    controls = {name: SimpleNamespace(value=value) for name, value in (CONTROLS | values).items()}
    outputs, definitions = page.app.run(defs=controls)
    return " ".join(output.text for output in outputs if output is not None), definitions


def test_the_page_runs_as_it_is():
    """With marimo's own controls, which have the names that the tests give values to."""
    _, definitions = page.app.run()
    for name in CONTROLS:
        assert hasattr(definitions[name], "value")
    assert len(definitions["policies"]) == 4


def test_each_picture_has_a_sentence():
    text, _ = opened()
    assert "The more people prefer a response" in text
    assert "The best policy takes the reference" in text
    assert "No policy lies above the grey curve" in text


@pytest.mark.parametrize("kind, margins", [
    ("logit (DPO)", "10.99 nats at p = .9, 34.53 at .999, and inf if all agree"),
    ("q (IPO)", "2.00 nats at p = .9, 2.50 at .999, and 2.50 if all agree")])
def test_a_certain_pair_runs_away_under_logit_alone(kind, margins):
    """Closed forms: 2 logit(p) / (2 tau) and (2p - 1) / (2 tau)."""
    assert margins in opened(kind=page.PSI[kind])[0]


@pytest.mark.parametrize("kind, place", [
    *[(kind, "bt") for kind in page.PSI],
    ("tanh", "cyclic"),
    ("tanh", "deterministic")])
def test_what_is_shown_is_exact(kind, place):
    """pi* is eq. 7's for this Psi."""
    _, definitions = opened(kind=page.PSI[kind], place=place)
    made = data.World(place)
    ref = exact.of_base(made)
    mu = torch.full_like(ref, 1 / 13)
    due = data.optimum(ref, page.PSI[kind](made.pstar), mu, 0.2)
    assert torch.equal(definitions["policies"]["pi* of this Psi"], due)


def test_hard_labels_lead_elsewhere_than_to_pi_star_of_a_bent_psi():
    """They see Psi(1) - Psi(0) alone; of q they lead to pi*."""
    for kind, same in (("q (IPO)", True), ("tanh", False)):
        policies = opened(kind=page.PSI[kind])[1]["policies"]
        limit = policies["where endless labels lead"]
        assert (data.kl(limit, policies["pi* of this Psi"]) < 1e-9) == same


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("kind", ["q (IPO)", "tanh", "majority"])
def test_endless_labels_lead_where_the_core_leads(kind, labels, monkeypatch):
    """exact.limit with the core's target and this psi."""
    monkeypatch.setattr(ipo, "psi", page.PSI[kind])
    made = data.World("cyclic")
    ref = exact.of_base(made)
    mu = torch.full_like(ref, 1 / 13)
    due = exact.limit(ref, made.pstar, mu, 0.2, labels)
    _, definitions = opened(kind=page.PSI[kind], labels=labels, place="cyclic")
    found = definitions["policies"]["where endless labels lead"]
    assert torch.allclose(found, due, atol=1e-6)


def test_an_export_holds_the_page_and_leaves_nothing(tmp_path):
    """A picture's sentence is in the HTML; git sees no new file."""
    made = tmp_path / "page.html"
    command = ["-m", "marimo", "export", "html", "lab/course/page.py", "-o", str(made)]
    before = untracked()
    done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No policy lies above the grey curve" in made.read_text()
    assert untracked() == before


def untracked():
    if not shutil.which("git") or not (HERE / ".git").exists():
        pytest.skip("not a checkout of git")
    command = ["git", "status", "--porcelain", "--untracked-files=all", "lab/course"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout


def test_the_page_is_no_program():
    """It says how it is opened, on stderr, and its status is 1, as Python does with a text."""
    with pytest.raises(SystemExit) as end:
        runpy.run_path(page.__file__, run_name="__main__")
    assert "marimo run lab/course/page.py" in end.value.code
