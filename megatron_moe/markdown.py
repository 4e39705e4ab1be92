"""Tables in Markdown, for records and for the pages of docs/."""

from __future__ import annotations

from collections.abc import Iterable


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
