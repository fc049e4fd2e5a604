"""The suite's modules stand beside each other, as `python tests/torture` finds them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
