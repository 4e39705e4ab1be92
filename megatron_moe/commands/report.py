"""The stories of ``report`` and ``compare``: what runs left, as pages that open anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.errors import ConfigError
from megatron_moe.report.compare import compare_page
from megatron_moe.report.page import run_page, write_page
from megatron_moe.report.read import read_run


def report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html``, of a run that is finished or still at work."""
    out = run_dir / "report.html"
    write_page(run_page(read_run(run_dir)), out)
    return out


def compare(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one page with several runs over each other.

    Raises:
        ConfigError: There are fewer than two.
    """
    if len({path.resolve() for path in run_dirs}) < 2:
        raise ConfigError("compare takes at least two different runs: name their run.dirs")
    write_page(compare_page([read_run(path) for path in run_dirs]), out)
    return out
