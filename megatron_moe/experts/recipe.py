"""Define the recipe of an ExpertPlan: the settings for building experts, all defaults resolved.

An ExpertPlan consists of a recipe and, for methods that need more, one table per layer.
`resolve.make_recipe` makes a recipe from a configuration.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron_moe.config.moe import Method, RouterInit

SCHEMA = 1
HELD_OUT_EVERY = 8
"""Every so many calibration sequences, one is left out of a fit and judges it."""
PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Relative penalties that a fit of ``down`` tries; the text that is left out chooses one."""

ROUTING_TURNS = 10
"""Turns of method split_routed, in which neurons change experts. Later ones move less than 5%."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All inputs of a plan's layers, except for the tables."""

    method: Method
    seed: int
    num_experts: int
    expert_ffn_hidden_size: int
    dense_ffn_hidden_size: int
    hidden_size: int
    router_init_std: float
    moe_layers: tuple[int, ...]
    # The following fields enter the hash only if they differ from their defaults, so that plans
    # that do not use a field keep the hash they had before it was added.
    shared_size: int = 0
    """Neurons of the shared expert."""
    num_sources: int = 1
    """Number of dense checkpoints, from which experts are taken in turn."""
    router_init: RouterInit = "normal"
    weight_scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of gate, up and down of every routed expert."""
    output_scale: float = 1.0
    """Factor of the routed experts' output at run time."""
    calibrated: bool = False
    """Whether a factor measured for each layer is multiplied in."""
    rescale_at: str = "weights"
    """Target of the measured factor: ``weights`` (down) or ``runtime`` (the output)."""
    reinit_ratio: float = 0.0
    noise_std: float = 0.0
    permutation_seed: int | None = None
    fit: tuple[str, ...] = ()
    """Parts that are solved for on text, in alphabetical order."""
    max_load: float = 0.0
    """Bound on the load with a fitted router; 0 without one."""
    fit_stream: float = 0.0
    routing: tuple[int | str, ...] = ()
    """Experts per token, router order and score function that a fit or a measured factor is for;
    empty without either."""
    source_experts: int = 0
    """Experts of a MoE source; 0 for a dense one."""
    choose: str = "even"
    twins: str = ""
    """Difference between copies of an expert, with method grow."""

    def content(self) -> dict[str, Any]:
        """Return the values that are hashed and stored in a plan file."""
        return {
            "schema": SCHEMA,
            **{
                f.name: getattr(self, f.name)
                for f in fields(self)
                if f.default is MISSING or getattr(self, f.name) != f.default
            },
        }
