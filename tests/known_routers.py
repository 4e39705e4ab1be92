"""A tiny model whose routing is known: a token's class decides which experts it goes to.

Attention and FFNs add nothing, so the hidden state of every layer is the token's embedding, which
points where its class (id modulo 4) says; in layer l the router's row of expert e points where
class e + l and, less, class e + l + 1 do.
"""

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import load_file, save_file
from tiny import save_dense

from megatron_moe.model.build import Model
from megatron_moe.model.routers import routers_in

CLASSES = EXPERTS = 4
LAYERS = 4


def save_silent(folder: Path) -> Path:
    """A dense model whose layers add nothing to the embedding."""
    save_dense(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1.0)
    embedding = tensors["model.embed_tokens.weight"].zero_()
    embedding[torch.arange(len(embedding)), torch.arange(len(embedding)) % CLASSES] = 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def set_routers(model: Model) -> None:
    """Rows that choose as `experts_of` says."""
    for module in model.modules:
        for router in routers_in(module):
            router.weight.data.zero_()
            for expert in range(EXPERTS):
                router.weight.data[expert, (expert + router.layer) % CLASSES] = 0.2
                router.weight.data[expert, (expert + router.layer + 1) % CLASSES] = 0.1


def experts_of(class_: int, layer: int) -> tuple[int, int]:
    """The experts that a token of the class goes to, the better first."""
    return (class_ - layer) % EXPERTS, (class_ - layer - 1) % EXPERTS


def write_classes(prefix: Path, classes: list[int], *, length: int, seed: int) -> np.ndarray:
    """A token file of one document of ids of these classes, as often; returns the ids."""
    drawn = np.random.default_rng(seed)
    ids = drawn.integers(0, 64, length) * CLASSES + drawn.choice(classes, length)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(torch.from_numpy(ids), [length])
    builder.finalize(f"{prefix}.idx")
    return ids
