"""Where a run computes: CUDA as Megatron-Core means it, or the CPU that `cpu.install` makes fit."""

from megatron_moe.runtime import environment

environment.prepare()
