"""The tools are scripts: their folder is on the path when one runs, so it is here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
