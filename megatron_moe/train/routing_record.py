"""Record which experts every token chose in training, and replay a record in another run.

Megatron-Core's RouterReplay makes the choices; a record is independent of the layout. Each rank
writes one file a step, and a run under any layout reads from the files of a step what its own
layers, samples and positions need.

Shape letters of this module:

    L  MoE layers of this rank   N  samples of this rank   K  moe_router_topk
    s  positions of this rank    B  micro_batch_size       T  tokens of a pass, s * B
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import DataError
from megatron_moe.hf.disk import replacing, write_text
from megatron_moe.model.router import CapacityRouter
from megatron_moe.model.routers import routers_in

Choices = dict[int, Tensor]
"""Choices of samples, ``(s, K)`` each, by index of the sample in the run."""


class LayerRouting:
    """Choices of one router in one step: those to replay, and those that it makes.

    A pass without a graph is the first pass of a layer that is recomputed; every schedule
    recomputes passes in their original order.
    """

    def __init__(self, router: CapacityRouter, replayed: Choices | None) -> None:
        self._replay: Any = router.router_replay
        self._replayed = replayed
        self._dtype = torch.uint8 if len(router.weight) <= 256 else torch.int16
        self._samples_B: list[int] = []
        self._waiting: deque[list[int]] = deque()
        self.recorded: Choices = {}

    def start_pass(self, samples_B: Tensor) -> None:
        """Set the samples of the next first pass."""
        self._samples_B = samples_B.tolist()

    def routed(self, route: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the result of ``route``, with choices that are recorded or replayed."""
        again = torch.is_grad_enabled() and bool(self._waiting)
        samples_B = self._waiting.popleft() if again else self._samples_B
        if not torch.is_grad_enabled():
            self._waiting.append(samples_B)
        if self._replayed is not None:
            chosen_sBK = torch.stack([self._replayed[sample] for sample in samples_B], dim=1)
            self._replay.set_target_indices(chosen_sBK.flatten(0, 1).long())
            self._replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        else:
            self._replay.set_router_replay_action(RouterReplayAction.RECORD)
        result = route()
        if self._replayed is None and not again:
            self._keep(self._replay.get_recorded_indices(), samples_B)
        self._replay.clear_indices()
        self._replay.clear_router_replay_action()
        return result

    def _keep(self, chosen_TK: Tensor, samples_B: list[int]) -> None:
        chosen_sBK = chosen_TK.to(self._dtype).unflatten(0, (-1, len(samples_B)))
        self.recorded |= dict(zip(samples_B, chosen_sBK.unbind(dim=1), strict=True))


class RoutingRecord:
    """The record that a run writes or reads, one step at a time.

    Args:
        config: The run's configuration.
        rank: This rank.
        size: Number of ranks.

    Raises:
        DataError: The record to replay is of another model, or missing.
    """

    def __init__(self, config: RunConfig, *, rank: int, size: int) -> None:
        moe = config.moe
        self._rank, self._size = rank, size
        self._record, self._replay = moe.record_routing, moe.replay_routing
        self._length = config.data.seq_length
        self._layers: dict[int, LayerRouting] = {}
        self._positions_s = torch.empty(0)
        header = {
            "num_moe_experts": moe.num_moe_experts,
            "moe_router_topk": moe.moe_router_topk,
            "seq_length": self._length,
        }
        if self._replay is not None:
            _check_header(self._replay, header)
        if self._record is not None and rank == 0:
            self._record.mkdir(parents=True, exist_ok=True)
            write_text(self._record / "routing.json", json.dumps(header) + "\n")

    @property
    def active(self) -> bool:
        """Whether the run records or replays."""
        return self._record is not None or self._replay is not None

    def start_step(self, modules: list[Any], step: int, samples: list[int], *, width: int) -> None:
        """Prepare the routers of ``modules`` for a step over these samples.

        Args:
            modules: Chunks of this rank's model.
            step: Steps taken before.
            samples: Indices of this rank's samples.
            width: Positions of this rank.

        Raises:
            DataError: The record has no choices for some of them.
        """
        if not self.active:
            return
        routers = list(routers_in(*modules))
        for router in routers:
            self._positions_s = router.positions(width)
        replayed: dict[int, Choices] = {}
        if self._replay is not None:
            folder = self._replay / f"step_{step + 1:08d}"
            layers = [router.layer for router in routers]
            replayed = read_step(folder, layers, samples, self._positions_s)
        for router in routers:
            own = replayed.get(router.layer)
            if own is not None:
                own = {sample: chosen.to(router.weight.device) for sample, chosen in own.items()}
            router.record = LayerRouting(router, own)
            self._layers[router.layer] = router.record

    def end_step(self, step: int) -> None:
        """Write this rank's choices of the step, if the run records."""
        if self._record is None:
            return
        folder = self._record / f"step_{step:08d}"
        folder.mkdir(exist_ok=True)
        layers = list(self._layers.values())
        samples = sorted(layers[0].recorded) if layers else []  # a stage may have dense layers only
        chosen = [torch.stack([layer.recorded[sample] for sample in samples]) for layer in layers]
        chosen_LNsK = torch.stack(chosen) if chosen else torch.empty(0)
        name = f"rank_{self._rank:05d}_of_{self._size:05d}.npz"
        with replacing(folder / name) as path, path.open("wb") as file:
            np.savez(
                file,
                layers=np.array(list(self._layers)),
                samples=np.array(samples),
                positions=self._positions_s.numpy(),
                chosen=chosen_LNsK.cpu().numpy(),
            )
        self._layers = {}


def read_step(
    folder: Path, layers: list[int], samples: list[int], positions_s: Tensor
) -> dict[int, Choices]:
    """Return the recorded choices of a step for these layers, samples and positions.

    Raises:
        DataError: The record lacks the step, or some of them.
    """
    files = _complete_set(folder)
    wanted = {position: i for i, position in enumerate(positions_s.tolist())}
    result: dict[int, Choices] = {layer: {} for layer in layers}
    missing = len(layers) * len(samples) * len(wanted)
    for path in files:
        with np.load(path) as part:
            rows = [(i, s) for i, s in enumerate(part["samples"].tolist()) if s in set(samples)]
            held = [(i, x) for i, x in enumerate(part["layers"].tolist()) if x in result]
            places = [(i, wanted[p]) for i, p in enumerate(part["positions"].tolist())
                      if p in wanted]  # fmt: skip
            if not (rows and held and places):
                continue
            chosen_LNsK = torch.from_numpy(part["chosen"])
        there, here = (torch.tensor(index) for index in zip(*places, strict=True))
        for l_index, layer in held:
            for n_index, sample in rows:
                empty_sK = chosen_LNsK.new_zeros(len(wanted), chosen_LNsK.shape[-1])
                own_sK = result[layer].setdefault(sample, empty_sK)
                own_sK[here] = chosen_LNsK[l_index, n_index, there]
                missing -= len(places)
    if missing:
        raise DataError(
            f"moe.replay_routing: {folder} lacks {missing:,} choices of this rank's layers, "
            "samples and positions: it was recorded with other text, batches or layers.\n"
            "  replay with the settings of data, train and run.seed that it was recorded with"
        )
    return result


def _complete_set(folder: Path) -> list[Path]:
    """Return the files of all ranks of one job; a step may have been recorded by several jobs."""
    by_size: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("rank_*_of_*.npz")):
        by_size.setdefault(path.stem.rpartition("_")[2], []).append(path)
    for size, paths in by_size.items():
        if len(paths) == int(size):
            return paths
    raise DataError(
        f"moe.replay_routing: {folder} has no complete record of the step.\n"
        "  record as many steps as the replaying run takes, or set moe.replay_routing=null"
    )


def _check_header(folder: Path, expected: dict[str, int]) -> None:
    path = folder / "routing.json"
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"moe.replay_routing ({folder}) must be a folder that moe.record_routing has written: "
            f"{path} cannot be read ({error}).\n  choose another folder"
        ) from error
    for name, value in expected.items():
        if stored.get(name) != value:
            raise DataError(
                f"moe.replay_routing ({folder}) was recorded with {name} = {stored.get(name)}, but "
                f"this run has {value}: its choices do not fit.\n  replay with the same setting"
            )
