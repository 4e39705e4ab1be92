"""The ExpertPlan: which dense neurons each expert is made of, and what its router says.

A SwiGLU layer is a sum over its neurons (row of gate, row of up, column of down), so an expert is a
list of neurons, and every way of building experts is another list. A plan is derived from
(method, seed, layer) alone: each rank computes what it needs of it, and no rank needs to be told.

Shape letters of this module:

    E  num_moe_experts          D  hidden_size
    F  ffn_hidden_size (dense)  M  moe_ffn_hidden_size, the neurons of one expert
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.run import Moe, Upcycle
from megatron_moe.hf.spec import DenseSpec

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The experts of one layer."""

    neurons_EM: NDArray[np.int64]
    """Dense neuron that each neuron of each expert is a copy of."""

    router_ED: NDArray[np.float32]
    """Rows of the router at the start."""


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """How every MoE layer of the model is built; ask it a layer at a time."""

    method: str
    seed: int
    num_experts: int
    expert_ffn_hidden_size: int
    dense_ffn_hidden_size: int
    hidden_size: int
    router_init_std: float
    moe_layers: tuple[int, ...]

    def layer(self, layer: int) -> LayerPlan:
        """The experts of layer ``layer``, counted from 0 over the whole model."""
        return LayerPlan(
            neurons_EM=METHODS[self.method](self, layer),
            router_ED=_normal_rows(self, layer),
        )

    @property
    def hash(self) -> str:
        """Same plan, same hash: sha256 over everything the layers are derived from."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        text = json.dumps({"schema": SCHEMA, **fields}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_expert_plan(spec: DenseSpec, moe: Moe, upcycle: Upcycle) -> ExpertPlan:
    """The plan that the configuration asks for, for a dense model of this shape."""
    return ExpertPlan(
        method=upcycle.method,
        seed=upcycle.seed,
        num_experts=moe.num_moe_experts,
        expert_ffn_hidden_size=moe.moe_ffn_hidden_size or spec.ffn_hidden_size,
        dense_ffn_hidden_size=spec.ffn_hidden_size,
        hidden_size=spec.hidden_size,
        router_init_std=upcycle.router_init_std,
        moe_layers=moe_layer_ids(moe, spec.num_layers),
    )


def moe_layer_ids(moe: Moe, num_layers: int) -> tuple[int, ...]:
    """Ids of the layers that become MoE, ascending."""
    return tuple(range(num_layers)) if moe.moe_layers == "all" else tuple(sorted(moe.moe_layers))


def _copy(plan: ExpertPlan, layer: int) -> NDArray[np.int64]:
    """Each expert is the whole dense FFN (arXiv 2212.05055, section 3; 2412.09952)."""
    neurons_M = np.arange(plan.expert_ffn_hidden_size, dtype=np.int64)
    return np.broadcast_to(neurons_M, (plan.num_experts, plan.expert_ffn_hidden_size))


def _normal_rows(plan: ExpertPlan, layer: int) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([plan.seed, layer])))
    shape = (plan.num_experts, plan.hidden_size)
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(plan.router_init_std)


METHODS: dict[str, Callable[[ExpertPlan, int], NDArray[np.int64]]] = {"copy": _copy}
"""Every way of choosing neurons; a method is a function, never a file per combination."""
