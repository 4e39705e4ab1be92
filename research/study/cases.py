"""Define the cases of the study: all methods, in sizes with equal cost per token if compared.

F is the dense FFN's intermediate_size. All cases but the dense one have 8 experts, top-2.

    shape   neurons of an expert   shared   per token
    dense   F (one expert)                  F
    whole   F                               2 F
    half    F / 2                           F
    parts   F / 8                           F / 4
    shared  3 F / 32               F / 4    7 F / 16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["dense", "whole", "half", "parts", "shared"]
Start = Literal["trained", "random"]

EXPERTS, TOPK = 8, 2


@dataclass(frozen=True, slots=True)
class Case:
    """One way to construct a model."""

    name: str
    shape: Shape
    upcycle: dict[str, Any]
    order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    start: Start = "trained"
    """The dense model to start from: the trained one, or one with random weights."""

    @property
    def measured(self) -> bool:
        """Whether the case needs `construct` first."""
        methods = ("sharing_inner", "sharing_inter", "weaver")
        return self.upcycle["method"] in methods or "calibrated" in self.upcycle.values()

    @property
    def file_name(self) -> str:
        """The case's name for use in paths."""
        return self.name.replace(", ", "--").replace("/", "-").replace(" ", "-")

    def moe(self, dense_size: int) -> dict[str, Any]:
        """Return section moe of the configuration, for a dense FFN of ``dense_size`` neurons."""
        sizes: dict[Shape, dict[str, Any]] = {
            "dense": {"num_moe_experts": 1, "moe_router_topk": 1},
            "whole": {},
            "half": {"moe_ffn_hidden_size": dense_size // 2},
            "parts": {"moe_ffn_hidden_size": dense_size // 8},
            "shared": {
                "moe_ffn_hidden_size": 3 * dense_size // 32,
                "moe_shared_expert_intermediate_size": dense_size // 4,
            },
        }
        routed = {"num_moe_experts": EXPERTS, "moe_router_topk": TOPK, "router_order": self.order}
        return {**routed, **sizes[self.shape]}


def _rescaled(name: str, shape: Shape, method: str, *rescales: str) -> list[Case]:
    return [
        Case(f"{name}, {rescale}", shape, {"method": method, "rescale": rescale})
        for rescale in rescales
    ]


_COPY = {"method": "copy"}
_GRANULAR = {"method": "granular"}
DENSE = Case("dense", "dense", _COPY, order="softmax_topk")
"""An MoE with one expert of weight one: the dense model, trained with the same code."""

_PAPERS = (
    *_rescaled("split_random", "parts", "split_random", "N/K", "none"),
    *_rescaled("split_clustered", "parts", "split_clustered", "N/K"),
    *_rescaled("sharing_inner", "parts", "sharing_inner", "N/K"),
    Case("from scratch, parts", "parts",
         {"method": "split_random", "rescale": "none"}, start="random"),
    Case("copy", "whole", _COPY),
    Case("copy, softmax_topk", "whole", _COPY, order="softmax_topk"),
    DENSE,
)  # fmt: skip
_OTHERS = (
    *_rescaled("split_random", "parts", "split_random", "N", "calibrated"),
    *_rescaled("split_random with shared", "shared", "split_random", "N/K"),
    *_rescaled("sharing_inter", "shared", "sharing_inter", "N/K"),
    *_rescaled("weaver", "shared", "weaver", "N/K"),
    Case("granular", "half", _GRANULAR),
    Case("granular, softmax_topk", "half", _GRANULAR, order="softmax_topk"),
    Case("qwen", "half", {"method": "qwen"}),
    Case("drop", "whole", {"method": "drop"}),
    Case("from scratch, whole", "whole",
         {"method": "drop", "reinit_ratio": 1.0}, start="random"),
    Case("mix", "whole", {"method": "mix"}),
)  # fmt: skip
FIRST = tuple(case.name for case in _PAPERS)
"""Cases for the papers' figures, which are trained before the others, with all seeds."""
TRAINED = (*_PAPERS, *_OTHERS)
"""Cases that are trained. mix uses branches of the dense model as sources."""

_ALL = ("none", "N/K", "N", "calibrated")
AT_STEP_0 = (
    DENSE,
    *_rescaled("split_random", "parts", "split_random", *_ALL),
    *_rescaled("split_clustered", "parts", "split_clustered", *_ALL),
    *_rescaled("sharing_inner", "parts", "sharing_inner", *_ALL),
    *_rescaled("split_random with shared", "shared", "split_random", *_ALL),
    *_rescaled("sharing_inter", "shared", "sharing_inter", *_ALL),
    *_rescaled("weaver", "shared", "weaver", *_ALL),
    Case("granular, exact", "half", _GRANULAR),
    Case("granular, paper", "half", {**_GRANULAR, "scale": "paper"}),
    Case("granular, none", "half", {**_GRANULAR, "scale": "none"}),
    Case("granular, softmax_topk, exact", "half", _GRANULAR, order="softmax_topk"),
    Case("granular, softmax_topk, paper", "half",
         {**_GRANULAR, "scale": "paper"}, order="softmax_topk"),
    Case("qwen, none", "half", {"method": "qwen"}),
    Case("copy, none", "whole", _COPY),
    Case("copy, softmax_topk, none", "whole", _COPY, order="softmax_topk"),
    Case("copy, softmax_topk, N/K", "whole",
         {**_COPY, "rescale": "N/K"}, order="softmax_topk"),
    Case("drop, none", "whole", {"method": "drop"}),
)  # fmt: skip
"""Cases that are constructed from SmolLM2 and not trained."""
