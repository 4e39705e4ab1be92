"""Write the tables of docs/recovery.md from solving.json and recovery.json beside it.

`make recovery` measures both anew. It takes about four hours of a core; after an interruption, the
same command resumes.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from megatron_moe.markdown import with_tables
from research import recovery, solving
from research.recovery import DOCS

PAGE = DOCS / "recovery.md"


def main() -> None:
    """Rewrite the tables of the page."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def render(text: str) -> str:
    """Return the page with current tables."""
    step0, trained = results("solving"), results("recovery")
    tables = {
        "step0": partial(solving.table, step0),
        "trained": partial(recovery.table, trained),
        "costs": partial(recovery.costs, trained),
    }
    return with_tables(text, tables)


def results(name: str) -> list[dict[str, Any]]:
    """Return the kept results of ``research.NAME``."""
    return json.loads((DOCS / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
