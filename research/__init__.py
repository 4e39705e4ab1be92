"""Make the project's own documents: calibration of the planner, and runs that pages report.

It is not part of the wheel. Run a module from the root of the repository: ``python -m
research.study``. Inputs come from the commands of tools/, which are made available for import here.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tools"))
