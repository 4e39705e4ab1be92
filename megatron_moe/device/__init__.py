"""Where a run computes: CUDA as Megatron-Core means it, or the CPU that `cpu.install` makes fit."""

import os

# Whether there is a GPU is asked before ranks are forked. Asked of the driver, the answer would
# leave CUDA unusable in them ("Cannot re-initialize CUDA in forked subprocess"); NVML's does not.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
