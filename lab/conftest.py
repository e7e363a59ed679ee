"""Where do lab's tests find the core? One folder up, wherever pytest is started.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
