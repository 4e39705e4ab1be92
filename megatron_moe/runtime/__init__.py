"""Run on CUDA as Megatron-Core does, or on the CPU after `cpu.install` has patched torch."""

from megatron_moe.runtime import environment

environment.prepare()
