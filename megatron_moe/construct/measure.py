"""The dense model at work on real text: what neurons do, for which part of the text, and on what.

Two passes over the same sequences, sharded as training is. The first, forward only, gathers a mean
hidden state of each sequence and a sample of every FFN's inputs; k-means cuts the sequences into as
many clusters as there are experts. The second, forward and backward, sums for each neuron and
cluster its first-order Taylor importance, abs(h * dL/dh) with h the input of down (LLaMA-MoE,
arXiv 2406.16554), and its magnitude, abs(h).

Shape letters: N sequences, S seq_length, s positions of this rank, D hidden_size, F dense neurons,
f this tp rank's, L layers, C clusters, H sampled inputs, B = 1 sequence of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.construct.partial import PartialFiles
from megatron_moe.data.batches import Batch, make_batch, slice_for_context_parallel
from megatron_moe.data.samples import Text
from megatron_moe.experts.balanced import balanced_kmeans
from megatron_moe.experts.draws import Use, generator
from megatron_moe.model.build import Model
from megatron_moe.parallel.sequence import zigzag
from megatron_moe.parallel.shards import ShardIndex
from megatron_moe.train.step import run_schedule

Progress = Callable[[int, int], None]
"""Told how many of how many rounds are done."""


@dataclass(slots=True)
class Measured:
    """What the passes add up; on each rank its part, after `reduced` the whole."""

    embedding_ND: Tensor
    """Sum over positions of the last layer's hidden state."""
    inputs: dict[int, Tensor]
    """By local layer, sampled inputs of the FFN, ``(H, D)``."""
    importance_LCF: Tensor
    activity_LCF: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {
            "embedding": self.embedding_ND,
            "importance": self.importance_LCF,
            "activity": self.activity_LCF,
            **{f"inputs.{layer}": value for layer, value in self.inputs.items()},
        }


@dataclass(slots=True)
class Measuring:
    """The passes over one dense model on one rank."""

    model: Model
    """Dense, filled; its weights are frozen here."""
    config: RunConfig
    """The dense model's: no layer routes."""
    texts: list[Text]
    groups: ProcessGroupCollection
    clusters: int
    seed: int
    found: Measured = field(init=False)
    _cluster_N: NDArray[np.int64] | None = field(init=False, default=None)
    _sequences: list[int] = field(init=False, default_factory=list)
    _seen: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        spec, measure = self.model.spec, self.config.measure
        sizes = spec.num_layers, self.clusters, spec.ffn_hidden_size
        self.found = Measured(
            embedding_ND=torch.zeros(measure.samples, spec.hidden_size),
            inputs={
                layer: torch.zeros(measure.samples * self._per_sequence, spec.hidden_size)
                for chunk in self.model.chunks
                for layer in chunk.layers
            },
            importance_LCF=torch.zeros(sizes, dtype=torch.float64),
            activity_LCF=torch.zeros(sizes, dtype=torch.float64),
        )
        for chunk in self.model.chunks:
            decoder: Any = chunk.module.decoder
            for layer, block in zip(chunk.layers, decoder.layers, strict=True):
                block.mlp.register_forward_pre_hook(self._input_hook(layer, block))
                block.mlp.linear_fc2.register_forward_pre_hook(self._neuron_hook(layer))
            if decoder.final_layernorm is not None:
                decoder.final_layernorm.register_forward_pre_hook(self._embedding_hook)
            for name, parameter in chunk.module.named_parameters():
                parameter.requires_grad_("word_embeddings" in name)  # what starts the graph

    @property
    def _per_sequence(self) -> int:
        measure = self.config.measure
        wanted = -(-measure.hidden_states // measure.samples)
        return min(wanted, self.config.data.seq_length)

    def run(self, kept: PartialFiles, progress: Progress) -> NDArray[np.int64]:
        """Both passes; returns the cluster of each sequence. Goes on from what was ``kept``."""
        rounds = list(self._rounds())
        done = kept.restore(self.found.tensors())
        total = 2 * len(rounds)
        for index in range(done, total):
            if index >= len(rounds) and self._cluster_N is None:
                self._cluster_N = self._clustered()
            backward = index >= len(rounds)
            self._sequences = rounds[index % len(rounds)]
            self._seen = {}
            run_schedule(
                self.model.modules, self._batches(), self.config, self.model, self.groups,
                forward_only=not backward,
            )  # fmt: skip
            for module in self.model.modules:
                module.zero_grad(set_to_none=True)
            progress(index + 1, total)
            if (index + 1) % self.config.measure.interval == 0:
                kept.save(self.found.tensors(), index + 1)
        return self._cluster_N if self._cluster_N is not None else self._clustered()

    def _rounds(self) -> Iterator[list[int]]:
        """This dp rank's sequences, as many at once as the pipeline has stages."""
        dp, stages = self.groups.dp, self.groups.pp.size()
        each = dp.size() * stages
        for start in range(0, self.config.measure.samples, each):
            first = start + dp.rank() * stages
            yield list(range(first, first + stages))

    def _batches(self) -> list[Batch]:
        cp, texts = self.groups.cp, self.texts
        batches = []
        for sequence in self._sequences:
            index = sequence % self.config.measure.samples  # what fills the last round
            text = texts[index % len(texts)]
            sample = text.chunk(index // len(texts) % text.num_chunks)
            batch = make_batch([sample])
            batches.append(slice_for_context_parallel(batch, cp_rank=cp.rank(), cp_size=cp.size()))
        return batches

    def _next(self, place: int) -> int | None:
        """Number of the sequence that passes ``place`` now; None for one that only fills."""
        index = self._seen.get(place, 0)
        self._seen[place] = index + 1
        sequence = self._sequences[index]
        return sequence if sequence < self.config.measure.samples else None

    def _embedding_hook(self, module: Any, args: tuple[Tensor, ...]) -> None:
        if self._cluster_N is None and (sequence := self._next(-1)) is not None:
            self.found.embedding_ND[sequence] = args[0].detach().float().sum(dim=(0, 1)).cpu()

    def _input_hook(self, layer: int, block: Any) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if self._cluster_N is not None or (sequence := self._next(layer)) is None:
                return
            x_sD = normalised(args[0].detach()[:, 0], module)
            stride = self.config.data.seq_length // self._per_sequence
            position_s = self._positions()
            row_s = position_s // stride
            taken_s = (position_s % stride == 0) & (row_s < self._per_sequence)
            rows = sequence * self._per_sequence + row_s[taken_s]
            self.found.inputs[layer][rows] = x_sD[taken_s.to(x_sD.device)].float().cpu()

        return hook

    def _neuron_hook(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if self._cluster_N is None or (sequence := self._next(layer)) is None:
                return
            h_sBf, values_sBf = args[0], args[0].detach()
            cluster = int(self._cluster_N[sequence])
            mine = ShardIndex(self.model.tp_rank, self.groups.tp.size()).slice_of(
                self.model.spec.ffn_hidden_size
            )
            at = (layer, cluster, mine)
            self.found.activity_LCF[at] += _sum(values_sBf.abs())

            def taylor(gradient_sBf: Tensor) -> None:  # must not hold h_sBf: it would hold itself
                self.found.importance_LCF[at] += _sum((values_sBf * gradient_sBf).abs())

            if h_sBf.requires_grad:
                h_sBf.register_hook(taylor)

        return hook

    def _positions(self) -> Tensor:
        """Places in the sequence of this rank's positions: cp's part, of it tp's run."""
        tp, cp = self.groups.tp, self.groups.cp
        whole_S = torch.arange(self.config.data.seq_length)
        of_cp = zigzag(whole_S, dim=0, cp_rank=cp.rank(), cp_size=cp.size())
        return of_cp.chunk(tp.size())[tp.rank()]

    def _clustered(self) -> NDArray[np.int64]:
        """Cluster of each sequence by its mean hidden state; the same on every rank."""
        mean_ND = world_sum(self.found.embedding_ND) / self.config.data.seq_length
        points_ND = torch.nn.functional.normalize(mean_ND).numpy()
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            drawn = generator(self.seed, 0, Use.CLUSTERS, 1)
            found[0] = balanced_kmeans(points_ND, self.clusters, drawn)
        dist.broadcast_object_list(found, src=0)
        return found[0]


def world_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, each of which holds zeros where another holds values."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.cpu()


def _sum(values_sBf: Tensor) -> Tensor:
    return values_sBf.double().sum(dim=(0, 1)).cpu()


def normalised(x_sD: Tensor, mlp: Any) -> Tensor:
    """What the FFN sees: Transformer Engine normalises inside its first linear layer."""
    weight_D = getattr(mlp.linear_fc1, "layer_norm_weight", None)
    if weight_D is None:
        return x_sD
    mean_s1 = x_sD.float().square().mean(dim=-1, keepdim=True)
    return x_sD.float() * (mean_s1 + mlp.config.layernorm_epsilon).rsqrt() * weight_D.float()
