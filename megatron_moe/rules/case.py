"""Define the input of the rules, and a message that several rules share."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Case:
    """The input of a rule: a configuration, its source model and the number of ranks."""

    config: RunConfig
    spec: ModelSpec
    world_size: int

    @property
    def vpp(self) -> int:
        """Number of model chunks of a pipeline rank."""
        return self.config.parallel.virtual_pipeline_parallel_size or 1

    @property
    def expert_ffn(self) -> int:
        """Number of neurons of one expert."""
        return self.config.moe.expert_size(self.spec.ffn_hidden_size)


def indivisible(name: str, value: int, divisor_name: str, divisor: int, why: str) -> str:
    """Return the message of a violated divisibility rule, with all valid divisors."""
    valid = ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)
    short = divisor_name.rpartition(".")[2]
    rule = f"{name} ({value}) must be divisible by {divisor_name} ({divisor}): {why}."
    return f"{rule}\n  valid {short}: {valid}"
