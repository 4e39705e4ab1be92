"""Named pipes in place of files, in which no reader of a test can get stuck."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_pipe(path: Path) -> Iterator[None]:
    """Put a named pipe in place of a file for the ``with`` block.

    Opening a pipe waits for its other end. A thread opens and closes that end, so that a reader
    that does open the pipe gets no bytes and its test fails, instead of waiting forever.
    """
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    ended = threading.Event()

    def write_nothing() -> None:
        while not ended.is_set():
            os.close(os.open(path, os.O_WRONLY))

    writer = threading.Thread(target=write_nothing, daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer.join()
        os.close(reader)
        path.unlink()
