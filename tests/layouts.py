"""Layouts to try things under: world size and degrees, by a name that reads like a table."""

import math
import re
from typing import Any

LAYOUTS = {
    "1": (1, {}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "ep2": (2, {"expert_parallel_size": 2}),
    "ep4": (4, {"expert_parallel_size": 4}),
    "etp2": (2, {"expert_tensor_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "pp2-vpp2": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}),
    "tp2-ep2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "tp2-ep4-etp1": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
    "pp2-first-1": (2, {"pipeline_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
    "tp4-ep2": (4, {"tensor_parallel_size": 4, "expert_parallel_size": 2}),
    "tp2-ep2-etp2": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2,
                         "expert_tensor_parallel_size": 2}),
    "tp2-pp2-ep4": (8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2,
                        "expert_parallel_size": 4}),
}  # fmt: skip

_DEGREES = {
    "tp": "tensor_parallel_size", "cp": "context_parallel_size", "pp": "pipeline_parallel_size",
    "vpp": "virtual_pipeline_parallel_size", "ep": "expert_parallel_size",
    "etp": "expert_tensor_parallel_size",
}  # fmt: skip


def layout(name: str) -> tuple[int, dict[str, int]]:
    """World size and degrees of a name such as ``"tp2 dp2 ep4"``; "1" is one rank."""
    degrees = dict(re.findall(r"([a-z]+)(\d+)", name))
    world_size = math.prod(int(degrees.get(axis, 1)) for axis in ("tp", "cp", "pp", "dp"))
    return world_size, {_DEGREES[a]: int(n) for a, n in degrees.items() if a != "dp"}


def changes(name: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """World size and settings of a name such as ``"tp2 dp2 ep4 drops recompute-full"``.

    capacity: a limit that no expert reaches. drops: one that a quarter of the choices exceeds,
    decided over whole sequences. padded: every expert gets its capacity, which holds all tokens.
    first-N, last-N: layers of the first or last pipeline stage. layout-X: contents of each chunk.
    allgather: tokens go to all ranks. replicated: no distributed optimizer.
    """
    world_size, parallel = layout(re.sub(r"layout-\S+", "", name))
    result: dict[str, dict[str, Any]] = {"parallel": parallel, "moe": {}, "train": {}}
    for word in name.split():
        match word.partition("-"):
            case ("first" | "last" as end, _, count):
                parallel[f"num_layers_in_{end}_pipeline_stage"] = int(count)
            case ("layout", _, chunks):
                parallel["pipeline_model_parallel_layout"] = chunks
            case ("capacity", _, _):
                result["moe"] |= {"moe_expert_capacity_factor": 2.0}
            case ("drops", _, _):
                result["moe"] |= {"moe_expert_capacity_factor": 0.75, "capacity_scope": "sequence"}
            case ("recompute", _, what):
                result["train"] |= {"recompute": what}
            case ("allgather", _, _):
                result["moe"] |= {"moe_token_dispatcher_type": "allgather"}
            case ("padded", _, _):
                result["moe"] |= {"moe_expert_capacity_factor": 2.0,
                                 "moe_pad_expert_input_to_capacity": True}  # fmt: skip
            case ("replicated", _, _):
                result["optimizer"] = {"use_distributed_optimizer": False}
    return world_size, result
