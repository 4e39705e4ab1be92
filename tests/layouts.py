"""Layouts to try things under: world size and degrees, by a name that reads like a table."""

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
    "tp2-ep2-etp2": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2,
                         "expert_tensor_parallel_size": 2}),
    "tp2-pp2-ep4": (8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2,
                        "expert_parallel_size": 4}),
}  # fmt: skip
