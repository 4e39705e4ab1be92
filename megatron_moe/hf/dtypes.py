"""Names of the dtypes of weights: in settings, in safetensors files, and in config.json."""

from __future__ import annotations

import torch

OF_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""dtypes of training, by ``train.precision``."""

OF_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""dtypes of weights that are read, by their names in the safetensors header."""

NAME_IN_SAFETENSORS = {dtype: name for name, dtype in OF_SAFETENSORS.items()}

OF_CONFIG = {str(dtype).removeprefix("torch."): dtype for dtype in OF_SAFETENSORS.values()}
"""dtypes of weights by their names in config.json."""
