"""Read the text column of Parquet and Arrow files in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe.data.files import suffix_of
from megatron_moe.data.packages import package_for
from megatron_moe.errors import DataError
from megatron_moe.regular_file import regular

_ROWS = 256
_ARROW_FILE = b"ARROW1"
"""First bytes of Arrow's file format; its stream format begins otherwise."""
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def text_batches(path: Path, text_key: str) -> Iterator[tuple[list[str | None], int]]:
    """Yield parts of the text column, each with the number of rows in the file (0 if unknown).

    Raises:
        DataError: A damaged file, no column of that name, a column of another type, bytes that are
            not UTF-8, or pyarrow is not installed.
    """
    arrow = package_for("pyarrow", path)
    row = 1
    try:
        batches = _parquet if suffix_of(path) == "parquet" else _arrow
        for column, num_rows in batches(arrow, path, text_key):
            yield _texts(column, path, row, text_key), num_rows
            row += len(column)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _parquet(_: Any, path: Path, text_key: str) -> Iterator[tuple[Any, int]]:
    file = package_for("pyarrow.parquet", path).ParquetFile(regular(path))
    _check_column(path, file.schema_arrow, text_key)
    for batch in file.iter_batches(_ROWS, columns=[text_key]):
        yield batch.column(0), file.metadata.num_rows


def _arrow(arrow: Any, path: Path, text_key: str) -> Iterator[tuple[Any, int]]:
    with regular(path).open("rb") as file:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    with arrow.memory_map(str(path)) as mapped:
        if is_file:
            reader = arrow.ipc.open_file(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader = arrow.ipc.open_stream(mapped)
        _check_column(path, reader.schema, text_key)
        for batch in batches:
            yield batch.column(text_key), 0


def _check_column(path: Path, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        raise DataError(
            f"{path} has no column {text_key!r}, only {', '.join(schema.names)}.\n"
            "  set data.text_key (tokenize: --text-key) to the column that holds the text"
        )
    kind = schema.field(text_key).type
    values = kind.value_type if hasattr(kind, "index_type") else kind  # of a dictionary column
    if str(values) not in _TEXT_TYPES:
        raise DataError(f"{path}: column {text_key!r} must hold strings, not {kind}")


def _texts(column: Any, path: Path, row: int, text_key: str) -> list[str | None]:
    texts: list[str | None] = []
    for number, value in enumerate(column.to_pylist(), start=row):
        try:
            texts.append(value.decode() if isinstance(value, bytes) else value)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: column {text_key!r} is not UTF-8 at byte {error.start}"
            ) from error
    return texts
