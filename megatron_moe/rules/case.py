"""What a rule looks at, and the words that rules share."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import DenseSpec


@dataclass(frozen=True, slots=True)
class Case:
    """What the rules look at."""

    config: RunConfig
    spec: DenseSpec
    world_size: int

    @property
    def vpp(self) -> int:
        """Model chunks of a pipeline rank."""
        return self.config.parallel.virtual_pipeline_parallel_size or 1

    @property
    def expert_ffn(self) -> int:
        """Neurons of one expert."""
        return self.config.moe.moe_ffn_hidden_size or self.spec.ffn_hidden_size


def indivisible(name: str, value: int, divisor_name: str, divisor: int, why: str) -> str:
    """A rule on divisors in words, with the divisors that keep it."""
    valid = ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)
    short = divisor_name.rpartition(".")[2]
    rule = f"{name} ({value}) must be divisible by {divisor_name} ({divisor}): {why}."
    return f"{rule}\n  valid {short}: {valid}"
