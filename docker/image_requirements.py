"""Print what pyproject.toml asks for and the image does not bring: one requirement a line.

To pip the image's builds of torch and Transformer Engine are older than the releases of the same
number, so it would replace them.
"""

import re
import sys
import tomllib
from pathlib import Path

FROM_THE_IMAGE = {"torch", "transformer-engine"}


def main(pyproject: Path) -> None:
    """Print the build tool and all dependencies that are left to install."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
    for requirement in wanted:
        if re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0] not in FROM_THE_IMAGE:
            print(requirement)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
