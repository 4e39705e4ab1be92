"""Where a run computes: CUDA as Megatron-Core means it, or the CPU that `cpu.install` makes fit."""

import os

# Libraries ask whether there is a GPU before ranks are forked. Asked of the driver, the answer
# would leave CUDA unusable in them ("Cannot re-initialize CUDA in forked subprocess"); NVML's does
# not. Our own question (gpus.visible_gpus) does not depend on NVML.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
