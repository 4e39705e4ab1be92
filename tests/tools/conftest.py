"""Put the tools' folder on the import path, as when a tool runs as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
