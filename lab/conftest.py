"""Where do lab's tests find the core? One folder up, wherever pytest is started.
"""
import sys
from pathlib import Path

# before marimo is: with it transformers takes any process for a notebook, and asks for IPython
from transformers import Trainer  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent))
