"""The story of ``megatron-moe plan``: predict one layout or find the fastest, and the whole run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.calibration import FITTED, Calibration
from megatron_moe.planner.check import CheckResult, check_layout
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.relief import searched
from megatron_moe.planner.run_table import run_report
from megatron_moe.planner.search import Candidate, SearchResult
from megatron_moe.planner.tables import check_report, search_report
from megatron_moe.planner.whole_run import Circumstances, WholeRun, whole_run


@dataclass(frozen=True, slots=True)
class Plan:
    """A prediction, in three forms: JSON, tables and a page."""

    config: RunConfig
    gpu: str
    result: CheckResult | SearchResult
    best: Candidate | None
    """The layout that was checked, or the fastest one; None if the checked one is illegal."""
    run: WholeRun | None

    @property
    def legal(self) -> bool:
        """Whether there is a legal layout."""
        return self.best is not None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``; the whole run is under ``run``."""
        return self.result.to_json() | {"run": None if self.run is None else self.run.to_json()}

    def tables(self) -> RenderableType:
        """Return the prediction as tables for a terminal."""
        if isinstance(self.result, CheckResult):
            layout = check_report(self.result)
        else:
            layout = search_report(self.result)
        return layout if self.run is None else Group(layout, Text(), run_report(self.run))

    def write_page(self, path: Path) -> None:
        """Write the prediction as a page.

        Raises:
            ConfigError: The layout is illegal, so that there is nothing to show.
            DataError: The file cannot be written.
        """
        from megatron_moe.report.page import write_page
        from megatron_moe.report.planning import plan_page

        if self.best is None or self.run is None:
            raise ConfigError(f"--report ({path}) needs a legal layout; remove it to see the rules")
        shown: dict[str, Any] = {"gpu": gpu_named(self.gpu)}
        if isinstance(self.result, CheckResult):
            shown["reasons"] = [*self.result.reasons, *self.result.reliefs]
        else:
            shown["others"] = self.result.best
        write_page(plan_page(self.config, self.best, self.run, **shown), path)


def plan(
    config: RunConfig,
    spec: ModelSpec,
    circumstances: Circumstances,
    *,
    gpus: int,
    gpu: str,
    check_only: bool,
    constants: Calibration = FITTED,
) -> Plan:
    """Check the layout of a run, or search the fastest one, and predict all of its steps.

    Raises:
        ConfigError: The GPU is unknown, or a search finds no legal layout or none that fits.
    """
    if check_only:
        result = check_layout(config, spec, gpus=gpus, gpu=gpu, constants=constants)
        best = result.candidate
    else:
        result = searched(config, spec, gpus=gpus, gpu=gpu, constants=constants)
        best = result.best[0]
    run = None if best is None else whole_run(config, spec, best, circumstances)
    return Plan(config, gpu, result, best, run)
