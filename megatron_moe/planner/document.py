"""Rewrite the tables of docs/planning.md from the code.

    python -m megatron_moe.planner.document docs/planning.md

Text between ``<!-- table: NAME -->`` and ``<!-- end -->`` is what `TABLES` prints; the prose
around it is written by hand. A test asks that the file is current.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import DenseSpec, spec_from_config
from megatron_moe.planner.calibration import FITTED, PRIOR, Calibration
from megatron_moe.planner.check import check_layout
from megatron_moe.planner.count import count_shape
from megatron_moe.planner.fit import (
    leave_one_model_out,
    predict,
    rescaled,
    score,
    sensitivity,
    without,
)
from megatron_moe.planner.memory import peak_memory
from megatron_moe.planner.published import published
from megatron_moe.planner.search import Candidate, search
from megatron_moe.planner.shape import dense_shape, upcycled_shape
from megatron_moe.planner.tables import MEANING

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DATE = re.compile(r"(Tables of )\d{4}-\d{2}-\d{2}")

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA2_7B = LLAMA3_8B | {
    "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096,
}  # fmt: skip


def render(text: str) -> str:
    """The document with current tables; everything else stays."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main(path: Path) -> None:
    """Rewrite ``path`` with current tables and today's date."""
    text = render(path.read_text(encoding="utf-8"))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path.write_text(DATE.sub(rf"\g<1>{today}", text), encoding="utf-8")


def constants() -> str:
    """Fitted constants and their priors."""
    rows = [
        (f.name, f"{getattr(PRIOR, f.name):.3g}", f"{getattr(FITTED, f.name):.3g}")
        for f in fields(Calibration)
    ]
    return _table(("constant", "prior", "fitted"), rows)


def predictions() -> str:
    """Every calibration row, predicted with and without its model in the fit."""
    rows = published()
    held_out = leave_one_model_out(rows)
    return _table(
        ("model", "GPUs", "layout", "batch", "capacity", "published", "model left out", "fitted"),
        [
            (
                row.model,
                row.degrees.gpus,
                str(row.degrees).split(" dp")[0],
                row.work.global_batch_size,
                row.work.capacity_factor or "dropless",
                f"{row.mfu:.1f}",
                f"{unseen:.1f}",
                f"{predict(row).mfu:.1f}",
            )
            for row, unseen in zip(rows, held_out, strict=True)
        ],
    )


def scores() -> str:
    """Agreement with the rows, under several ways of predicting them."""
    rows = published()
    cases = {
        "model left out of the fit": score(leave_one_model_out(rows), rows),
        "fitted on all rows": score([predict(row).mfu for row in rows], rows),
        "priors, nothing fitted": score([predict(row, PRIOR).mfu for row in rows], rows),
        "model left out, batch 128 where a row names none": sensitivity(rows, global_batch=128),
        "model left out, batch 512 where a row names none": sensitivity(rows, global_batch=512),
    }
    return _table(
        ("prediction", "mean absolute error, points", "Spearman"),
        [(name, f"{s.mean_absolute_error:.2f}", f"{s.spearman:.3f}") for name, s in cases.items()],
    )


def ablation() -> str:
    """What each term is worth: its share of the step, and the error without it."""
    rows = published()
    times = [predict(row) for row in rows]
    lines = []
    for term in times[0].parts:
        shares = [100 * time.parts[term] / time.step_seconds for time in times]
        error = score(rescaled(without(term, rows), rows), rows).mean_absolute_error
        lines.append((error, term, f"{min(shares):.1f} to {max(shares):.1f}"))
    full = score(rescaled([time.mfu for time in times], rows), rows).mean_absolute_error
    return _table(
        ("without", "which is", "its share of a step, %", "mean absolute error, points"),
        [
            ("nothing", "the whole model", "", f"{full:.2f}"),
            *((t, MEANING[t], share, f"{e:.2f}") for e, t, share in sorted(lines, reverse=True)),
        ],
    )


def case() -> str:
    """The first choices for Llama-3-8B E8T2 on 128 H100, and the published layout."""
    config, spec = _paper_case()
    best = list(search(config, spec, gpus=128).best)
    named = check_layout(config, spec, gpus=128).candidate
    assert named is not None
    lines = [_choice(place, one) for place, one in enumerate(best, start=1)]
    head = ("", "layout", "micro-batch", "recompute", "MFU", "GiB", "output layer", "bubble",
            "tp + cp", "dp")  # fmt: skip
    return _table(head, [*lines, _choice("published", named)])


def memory() -> str:
    """Memory of each calibration row by part, predicted."""
    lines = {}
    for row in published():
        parts = peak_memory(row.shape, row.work, row.degrees)
        name = f"{row.model}, {row.degrees.gpus} GPUs, {str(row.degrees).split(' dp')[0]}"
        lines[name] = (
            name,
            *(
                f"{value:.1f}"
                for value in (
                    parts.weights, parts.gradients, parts.optimizer, parts.activations,
                    parts.dispatcher + parts.logits,
                    parts.communication + parts.framework + parts.fragmentation, parts.total,
                )
            ),
        )  # fmt: skip
    head = ("run", "weights", "gradients", "optimizer", "activations", "dispatcher, logits",
            "margins", "total")  # fmt: skip
    return _table(head, lines.values())


def flops() -> str:
    """Counts that papers print, and ours."""
    dense = spec_from_config(LLAMA2_7B)
    rows = [("LLaMA-2-7B", count_shape(dense_shape(dense), sequence_length=4096), "62.9")]
    for active, experts, printed in ((2, 16, "31.9"), (4, 16, "36.3"), (2, 8, "36.3")):
        moe = _config(experts=experts, active=active, size=11008 // experts, length=4096).moe
        shape = upcycled_shape(dense, moe)
        name = f"LLaMA-MoE {active}/{experts}"
        rows.append((name, count_shape(shape, sequence_length=4096), printed))
    config, spec = _paper_case()
    for name, shape, printed in (
        ("Llama-3-8B", dense_shape(spec), "4.7e14 (forward + backward)"),
        ("Llama-3-8B E8T2", upcycled_shape(spec, config.moe), "7.5e14 (forward + backward)"),
    ):
        rows.append((name, count_shape(shape, sequence_length=8192), printed))
    return _table(
        ("model", "sequence", "total", "active", "forward", "forward + backward", "printed"),
        [
            (
                name,
                c.sequence_length,
                f"{c.total_parameters / 1e9:.2f} B",
                f"{c.active_parameters / 1e9:.2f} B",
                f"{c.forward_flops / 1e12:.1f} T",
                f"{c.training_flops:.3e}",
                printed,
            )
            for name, c, printed in rows
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (constants, predictions, scores, ablation, case, memory, flops)
}


def _paper_case() -> tuple[RunConfig, DenseSpec]:
    layout = {
        "context_parallel_size": 2, "pipeline_parallel_size": 4,
        "virtual_pipeline_parallel_size": 8, "expert_parallel_size": 8,
    }  # fmt: skip
    config = _config(experts=8, active=2, size=None, length=8192, **layout)
    return config, spec_from_config(LLAMA3_8B)


def _config(
    *, experts: int, active: int, size: int | None, length: int, **layout: int
) -> RunConfig:
    tree = {
        "run": {"dir": "run"},
        "dense": {"path": "dense"},
        "moe": {
            "num_moe_experts": experts, "moe_router_topk": active, "moe_ffn_hidden_size": size,
            "moe_expert_capacity_factor": 1.0,
        },
        "data": {"path": "data", "seq_length": length},
        "train": {"steps": 1000, "global_batch_size": 256},
        "parallel": layout,
    }  # fmt: skip
    return build(RunConfig, tree)


def _choice(place: int | str, one: Candidate) -> tuple[object, ...]:
    share = {name: 100 * s / one.time.step_seconds for name, s in one.time.parts.items()}
    return (
        place,
        str(one.degrees),
        one.work.micro_batch_size,
        one.work.recompute,
        f"{one.time.mfu:.1f}",
        f"{one.memory.total:.1f}",
        *(f"{value:.1f}%" for value in (share["output_layer"], share["bubble"])),
        *(f"{value:.1f}%" for value in (share["tp"] + share["cp"], share["dp"])),
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
