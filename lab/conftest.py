"""What do lab's tests share? The core's folder, the paper's Psi whatever a student made of it, a tiny world,
and what the pages quote.
"""
import functools
import gc
import importlib.metadata
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test goes online
# before torch is imported: with more threads a process that forks, as a test does, leaves its child waiting
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

# before marimo is: with it transformers takes any process for a notebook, and asks for IPython
from transformers import Trainer  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402: one folder up, wherever pytest is started
import ipo  # noqa: E402


def pytest_collection_finish():
    """What imports have made stays in any case, and looks for garbage among it take much of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def packages():
    """At each step TRL asks whether peft is there, for which accelerate reads and parses a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "metadata", functools.cache(importlib.metadata.metadata))
        yield


@pytest.fixture(autouse=True)
def paper_psi(monkeypatch):
    """Psi(q) = q; matrices this small lose more to a second thread than they gain."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # what a test draws is always the same
    monkeypatch.setattr(ipo, "psi", lambda q: q)


@pytest.fixture(scope="module")
def bt3():
    """One more world, --data bt3: Bradley-Terry's, with 4 prompts x 4 responses."""
    make = data.World.__init__

    def init(self, name, words=data.WORDS, lengths=data.LENGTHS):
        if name == "bt3":
            words, lengths = ["good", "dull", "hot"], (0, 1)
        make(self, name, words, lengths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.World, "__init__", init)
        patch.setattr(data, "WORLDS", (*data.WORLDS, "bt3"))
        yield


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, by path, instead of the files."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from lab.common import pictures
    drawn = {}
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.update({path: figure}))
    return drawn


@pytest.fixture
def quoted(request):
    """{command: the lines that it printed}: what stands under each `<!-- measured: COMMAND -->` of the room.

    That is a fenced block, or a table.
    """
    page = (request.path.parent / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- measured: (.+?) -->\n+(?:```\n(.*?)```|((?: *\|[^\n]*\n)+))", page, re.S)
    return {command: (fenced or table).splitlines() for command, fenced, table in found}


@pytest.fixture
def cells():
    """The cells of a row of a table, without what pads them."""
    return lambda line: [cell.strip() for cell in line.strip().strip("|").split("|")]
