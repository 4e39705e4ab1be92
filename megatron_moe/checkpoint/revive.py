"""Re-create dead experts from siblings, weights and optimizer state, under any layout.

The two experts may be on different ranks, and a distributed optimizer splits the state of each over
ranks at any element. The boxes of checkpoints say which elements of which global tensor a rank has,
so one rule serves every layout: collect the sibling's elements, and write them wherever elements of
the dead expert are.

Shape letters of this module:

    E  num_moe_experts   D  width of a router row   R  rows of a global tensor   X  its other axes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.checkpoint.boxes import Box
from megatron_moe.checkpoint.sharded import all_boxes
from megatron_moe.checkpoint.storage import Boxes
from megatron_moe.train.revival import Revival
from megatron_moe.train.state import TrainState

COPIED = ("weight", "master", "exp_avg_sq")
"""Tensors that an expert takes over from its sibling. The rest of the optimizer state, means of
gradients, is set to zero: it belongs to other tokens. A mean of squares of zero would make the
first updates too large, by up to (1 - adam_beta1) / sqrt(1 - adam_beta2)."""


@torch.no_grad()
def revive(state: TrainState, revivals: Sequence[Revival], groups: ProcessGroupCollection) -> None:
    """Overwrite weights and optimizer state of dead experts; all ranks must call it.

    It needs memory for two fp32 copies of one expert's largest matrix, and reduces the sibling's
    weights, master weights and mean of squares in fp32 over the ranks of the pipeline stage.

    Args:
        state: Training state, changed in place.
        revivals: What to re-create, the same on all ranks.
        groups: This rank's process groups.
    """
    if not revivals:
        return
    state.gather_weights()
    boxes = all_boxes(state, groups)
    for layer in dict.fromkeys(revival.layer for revival in revivals):
        if any(layer in chunk.layers for chunk in state.model.chunks):  # on all ranks of a stage
            tensors = _LayerTensors(boxes, layer, groups.tp_dp_cp, state.model.device)
            tensors.revive([revival for revival in revivals if revival.layer == layer])


class _LayerTensors:
    """Global tensors of a MoE layer whose first axis is that of experts, and this rank's boxes."""

    def __init__(
        self, boxes: Boxes, layer: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        names = [f"decoder.layers.{layer}.mlp.{part}." for part in ("experts", "router")]
        self._boxes = {key: held for key, held in boxes.items() if any(n in key for n in names)}
        self._group, self._device = group, device
        own = {key: held[0].global_shape for key, held in self._boxes.items()}
        listed = [own] * group.size()
        dist.all_gather_object(listed, own, group=group)  # a rank may hold no state of a tensor
        self._shapes = {key: shape for shapes in listed for key, shape in shapes.items()}

    def revive(self, revivals: Sequence[Revival]) -> None:
        """Re-create the experts of these revivals."""
        weights = sorted(key for key in self._shapes if not key.startswith("optimizer."))
        gate = [key for key in weights if key.endswith(".router.output_weight")]
        hidden = [key for key in weights if key.endswith(".router.weight")]
        # With a gate of two layers, the first one is an input of every expert's logit.
        logits, untouched = (gate[0], hidden[0]) if gate else (hidden[0], None)
        for key in weights:
            if key == logits:
                self._move_rows(key, revivals)
            elif key != untouched:
                self._copy_rows(key, revivals)

    def _move_rows(self, key: str, revivals: Sequence[Revival]) -> None:
        """Write the router rows of the revivals, computed from master weights if there are any."""
        tensors = self._tensors(key)
        newest = tensors.get("master", key)
        rows_ED = self._rows(newest, range(self._shapes[key][0]))
        self._copy_rows(key, revivals)
        for revival in revivals:
            row_D = revival.row(rows_ED).float()
            for kind in ("weight", "master"):
                if kind in tensors:
                    self._write(tensors[kind], revival.expert, row_D)

    def _copy_rows(self, key: str, revivals: Sequence[Revival]) -> None:
        """Copy what an expert takes over of a parameter and its state, and clear the rest."""
        for kind, name in self._tensors(key).items():
            for revival in revivals:
                if kind in COPIED:
                    (row_X,) = self._rows(name, range(revival.sibling, revival.sibling + 1))
                else:
                    row_X = torch.zeros(self._shapes[name][1:], device=self._device)
                self._write(name, revival.expert, row_X)

    def _tensors(self, key: str) -> dict[str, str]:
        """Return the names of a parameter and of its optimizer state, by kind, in one order."""
        suffix = f".{key}"
        state = {name.split(".")[1]: name for name in sorted(self._shapes) if name.endswith(suffix)}
        return {"weight": key, **state}

    def _rows(self, name: str, rows: range) -> Tensor:
        """Return rows of a global tensor in fp32, ``(R, X)``, on every rank of the stage.

        Replicas hold equal elements, so their maximum is any one of them.
        """
        shape = (len(rows), *self._shapes[name][1:])
        all_RX = torch.full(shape, -torch.inf, device=self._device)
        for own_RX, region in self._overlaps(name, rows):
            all_RX[region] = own_RX.to(self._device, torch.float32)
        dist.all_reduce(all_RX, op=dist.ReduceOp.MAX, group=self._group)
        return all_RX

    def _write(self, name: str, row: int, values_X: Tensor) -> None:
        """Write this rank's part of one row of a global tensor."""
        for own_RX, region in self._overlaps(name, range(row, row + 1)):
            own_RX.copy_(values_X[None][region])

    def _overlaps(self, name: str, rows: range) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Yield this rank's parts of these rows: a view, and its region within them."""
        for box in self._boxes.get(name, ()):
            if (part := _overlap(box, rows)) is not None:
                yield part


def _overlap(box: Box, rows: range) -> tuple[Tensor, tuple[slice, ...]] | None:
    first, *others = zip(box.offset, box.tensor.shape, strict=True)
    start, stop = max(first[0], rows.start), min(sum(first), rows.stop)
    if start >= stop:
        return None
    region = [slice(offset, offset + size) for offset, size in others]
    own = box.tensor.detach()[start - first[0] : stop - first[0]]
    return own, (slice(start - rows.start, stop - rows.start), *region)
