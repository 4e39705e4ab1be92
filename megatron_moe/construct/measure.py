"""Measure the dense model on text: importance and activity of neurons, and inputs of FFNs.

Two passes run over the same sequences, sharded like training. The first, forward only, gathers the
mean hidden state of each sequence and a sample of every FFN's inputs; k-means then divides the
sequences into one cluster per expert. The second, forward and backward, sums for each neuron and
cluster the first-order Taylor importance, abs(h * dL/dh) with h the input of down (LLaMA-MoE,
arXiv 2406.16554), and the magnitude, abs(h).

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
"""Callback for progress, called with the rounds done and the total number of rounds."""


@dataclass(slots=True)
class MeasuredSums:
    """Sums accumulated on one rank; `world_sum` adds them over all ranks."""

    embedding_ND: Tensor
    """Sum over positions of the last layer's hidden state."""
    inputs: dict[int, Tensor]
    """Sampled inputs of the FFN, ``(H, D)``, by local layer."""
    importance_LCF: Tensor
    activity_LCF: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {
            "embedding": self.embedding_ND,
            "importance": self.importance_LCF,
            "activity": self.activity_LCF,
            **{f"inputs.{layer}": value for layer, value in self.inputs.items()},
        }


@dataclass(slots=True)
class Measurement:
    """Both measurement passes over a dense model, on one rank."""

    model: Model
    """Filled dense model; its weights are frozen by this class."""
    config: RunConfig
    """Configuration of the dense model, without MoE layers."""
    texts: list[Text]
    groups: ProcessGroupCollection
    clusters: int
    seed: int
    by_cluster: bool
    """Whether to run the second pass, over clusters of the text."""
    sums: MeasuredSums = field(init=False)
    _cluster_N: NDArray[np.int64] | None = field(init=False, default=None)
    _sequences: list[int] = field(init=False, default_factory=list)
    _seen: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        spec, measure = self.model.spec, self.config.measure
        sizes = spec.num_layers, self.clusters, spec.ffn_hidden_size
        self.sums = MeasuredSums(
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
                parameter.requires_grad_("word_embeddings" in name)  # starts the graph

    @property
    def _per_sequence(self) -> int:
        measure = self.config.measure
        count = -(-measure.hidden_states // measure.samples)
        return min(count, self.config.data.seq_length)

    def run(self, partial: PartialFiles, progress: Progress) -> NDArray[np.int64] | None:
        """Run the passes, resuming from ``partial``.

        Returns:
            The cluster of each sequence; None without a second pass.
        """
        turns = list(rounds(self.config.measure.samples, self.groups))
        done = partial.restore(self.sums.tensors())
        total = len(turns) * (2 if self.by_cluster else 1)
        for index in range(done, total):
            if index >= len(turns) and self._cluster_N is None:
                self._cluster_N = self._clustered()
            backward = index >= len(turns)
            self._sequences = turns[index % len(turns)]
            self._seen = {}
            batches = batches_of(self._sequences, self.texts, self.config, self.groups)
            run_schedule(
                self.model.modules, batches, self.config, self.model, self.groups,
                forward_only=not backward,
            )  # fmt: skip
            for module in self.model.modules:
                module.zero_grad(set_to_none=True)
            progress(index + 1, total)
            if (index + 1) % self.config.measure.interval == 0:
                partial.save(self.sums.tensors(), index + 1)
        if self.by_cluster and self._cluster_N is None:  # resumed after the last round
            self._cluster_N = self._clustered()
        return self._cluster_N

    def _next(self, hook: int) -> int | None:
        """Return the index of the sequence that reaches ``hook`` now, or None if it is padding."""
        index = self._seen.get(hook, 0)
        self._seen[hook] = index + 1
        sequence = self._sequences[index]
        return sequence if sequence < self.config.measure.samples else None

    def _embedding_hook(self, module: Any, args: tuple[Tensor, ...]) -> None:
        if self._cluster_N is None and (sequence := self._next(-1)) is not None:
            self.sums.embedding_ND[sequence] = args[0].detach().float().sum(dim=(0, 1)).cpu()

    def _input_hook(self, layer: int, block: Any) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if self._cluster_N is not None or (sequence := self._next(layer)) is None:
                return
            x_sD = normalized(args[0].detach()[:, 0], module)
            stride = self.config.data.seq_length // self._per_sequence
            position_s = self._positions()
            row_s = position_s // stride
            sampled_s = (position_s % stride == 0) & (row_s < self._per_sequence)
            rows = sequence * self._per_sequence + row_s[sampled_s]
            self.sums.inputs[layer][rows] = x_sD[sampled_s.to(x_sD.device)].float().cpu()

        return hook

    def _neuron_hook(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if self._cluster_N is None or (sequence := self._next(layer)) is None:
                return
            h_sBf, values_sBf = args[0], args[0].detach()
            cluster = int(self._cluster_N[sequence])
            neurons = ShardIndex(self.model.tp_rank, self.groups.tp.size()).slice_of(
                self.model.spec.ffn_hidden_size
            )
            at = (layer, cluster, neurons)
            self.sums.activity_LCF[at] += _sum(values_sBf.abs())

            def taylor(gradient_sBf: Tensor) -> None:  # a reference to h_sBf would be a cycle
                self.sums.importance_LCF[at] += _sum((values_sBf * gradient_sBf).abs())

            if h_sBf.requires_grad:
                h_sBf.register_hook(taylor)

        return hook

    def _positions(self) -> Tensor:
        """Return this rank's positions in the sequence: its tp chunk of its cp slice."""
        tp, cp = self.groups.tp, self.groups.cp
        whole_S = torch.arange(self.config.data.seq_length)
        cp_slice = zigzag(whole_S, dim=0, cp_rank=cp.rank(), cp_size=cp.size())
        return cp_slice.chunk(tp.size())[tp.rank()]

    def _clustered(self) -> NDArray[np.int64]:
        """Cluster the sequences by their mean hidden states; the same on every rank."""
        mean_ND = world_sum(self.sums.embedding_ND) / self.config.data.seq_length
        points_ND = torch.nn.functional.normalize(mean_ND).numpy()
        clusters: list[Any] = [None]
        if dist.get_rank() == 0:
            rng = generator(self.seed, 0, Use.CLUSTERS, 1)
            clusters[0] = balanced_kmeans(points_ND, self.clusters, rng)
        dist.broadcast_object_list(clusters, src=0)
        return clusters[0]


def rounds(samples: int, groups: ProcessGroupCollection) -> Iterator[list[int]]:
    """Yield this dp rank's sequences, one per pipeline stage in each round."""
    dp, stages = groups.dp, groups.pp.size()
    for start in range(0, samples, dp.size() * stages):
        first = start + dp.rank() * stages
        yield list(range(first, first + stages))


def batches_of(
    sequences: list[int], texts: list[Text], config: RunConfig, groups: ProcessGroupCollection
) -> list[Batch]:
    """Return this cp rank's part of sequences; padding of the last round wraps around."""
    cp, batches = groups.cp, []
    for sequence in sequences:
        batch = calibration_batch(texts, sequence % config.measure.samples)
        batches.append(slice_for_context_parallel(batch, cp_rank=cp.rank(), cp_size=cp.size()))
    return batches


def calibration_batch(texts: list[Text], index: int) -> Batch:
    """Return a sequence of the calibration text as a batch; domains take turns."""
    text = texts[index % len(texts)]
    return make_batch([text.chunk(index // len(texts) % text.num_chunks)])


def world_sum(values: Tensor) -> Tensor:
    """Sum over all ranks; each rank has zeros in the elements that other ranks measured."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.cpu()


def _sum(values_sBf: Tensor) -> Tensor:
    return values_sBf.double().sum(dim=(0, 1)).cpu()


def normalized(x_sD: Tensor, mlp: Any) -> Tensor:
    """Return the FFN's normalized input; Transformer Engine normalizes in its first linear."""
    weight_D = getattr(getattr(mlp, "linear_fc1", None), "layer_norm_weight", None)
    if weight_D is None:
        return x_sD
    mean_s1 = x_sD.float().square().mean(dim=-1, keepdim=True)
    return x_sD.float() * (mean_s1 + mlp.config.layernorm_epsilon).rsqrt() * weight_D.float()
