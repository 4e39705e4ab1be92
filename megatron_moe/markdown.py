"""Tables in Markdown, for records and for the pages of docs/."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table, with a newline at its end; a bar in a cell is written as an entity.

    >>> print(markdown_table(["rank", "path"], [[0, "a|b"]]), end="")
    | rank | path |
    | --- | --- |
    | 0 | a&#124;b |
    """
    first = list(head)
    lines = [first, ["---"] * len(first), *([str(cell) for cell in row] for row in rows)]
    return "".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines
    )


def with_tables(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    r"""Return a page with its tables written anew, between the comments that name them.

    Raises:
        KeyError: The page names a table that is not in ``tables``.

    >>> page = "Losses:\n\n<!-- table: losses -->\nold\n<!-- end -->\n"
    >>> print(with_tables(page, {"losses": lambda: "new\n"}), end="")
    Losses:
    <BLANKLINE>
    <!-- table: losses -->
    new
    <!-- end -->
    """
    return _BLOCK.sub(lambda block: block[1] + tables[block[2]]() + block[3], page)
