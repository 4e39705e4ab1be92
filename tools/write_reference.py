"""Write the pages of docs/ that are generated from the code: models, settings, architecture.

    python tools/write_reference.py

docs/models.md lists the families of source models; docs/settings.md lists every setting of
``config/run.py``; docs/architecture.md lists every module of the package with the first sentence of
its docstring. A test checks that all are current.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed")]

from pydantic import BaseModel  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402

from megatron_moe.commands.export import architecture_for  # noqa: E402
from megatron_moe.config.data import Domain  # noqa: E402
from megatron_moe.config.moe import Moe  # noqa: E402
from megatron_moe.config.run import RunConfig  # noqa: E402
from megatron_moe.config.train import BatchRamp, Stage  # noqa: E402
from megatron_moe.errors import CheckpointError  # noqa: E402
from megatron_moe.hf.families import FAMILIES, REFUSED, FamilyRow  # noqa: E402
from megatron_moe.hf.rope import ROPE_TYPES  # noqa: E402
from megatron_moe.hf.spec import spec_from_config  # noqa: E402
from megatron_moe.markdown import markdown_table  # noqa: E402

SETTINGS, ARCHITECTURE = ROOT / "docs/settings.md", ROOT / "docs/architecture.md"
MODELS = ROOT / "docs/models.md"
TESTED: dict[str, tuple[str, dict[str, Any]]] = {
    **importlib.import_module("test_parity").MODELS,
    **importlib.import_module("test_moe_source").MODELS,
}

HEAD_OF_SETTINGS = """# Settings

A run is configured by one YAML file; `key.path=value` arguments override it. An unknown key is an
error that suggests the right one. Settings that Megatron-Core has under the same name keep its
meaning. `megatron-moe schema > run.schema.json` writes the same as a JSON schema for editors.

This page is generated from `megatron_moe/config/` by `python tools/write_reference.py`.
"""

HEAD_OF_MODELS = """# Supported models

A source model must have Llama's block: RMSNorm before (or after) attention and FFN, rotary
attention, and SwiGLU, in a dense FFN or in experts. Anything else is refused, with all reasons at
once.
[docs/extending.md](extending.md) shows how to add a family.

This page is generated from `megatron_moe/hf/families.py` by `python tools/write_reference.py`.

## Families

"""

HEAD_OF_ARCHITECTURE = """# Architecture

The package reads in the order in which data flows, and imports point one way: a folder may import
folders above it in this list, never below (`tests/test_import_order.py`). Four ideas carry it:

1. **An `ExpertPlan` is small; weights are sliced, never converted.** Every construction method is
   the same object: which source neurons each expert takes, factors, router rows.
2. **`parallel/shards.py` alone knows which slice of which tensor a rank holds.** Upcycling walks
   the local parameters and reads exactly their rows or columns. There is no model object of the
   source, no full tensor and no broadcast.
3. **One name table** (`hf/names.py`) maps Hugging Face to Megatron-Core, in both directions.
4. **The trainer is the same program on CPU/gloo and on CUDA/NCCL**, so CI proves every layout.

This page is generated from the docstrings of the modules by `python tools/write_reference.py`.
"""

FOLDERS = {
    "": "errors, logging and Markdown tables",
    "runtime": "where ranks run: devices, engines, joining a job",
    "config": "settings, and how they are loaded",
    "hf": "Hugging Face folders: names, headers, reading, writing",
    "experts": "which source neurons each expert takes",
    "parallel": "layouts, and who holds what",
    "rules": "every rule a configuration must keep",
    "planner": "parameters, memory, FLOPs, time, search: arithmetic only",
    "model": "Megatron-Core's model, built empty and filled by upcycling",
    "data": "text to batches",
    "train": "steps, the loop, and what a run survives",
    "checkpoint": "saving, restoring, resharding",
    "source": "what a run starts from besides a Hugging Face folder",
    "construct": "measuring the dense model, for methods that need it",
    "evaluate": "losses and tasks",
    "analyze": "where tokens go, and what experts became",
    "report": "a run on one HTML page",
    "bench": "timed steps and collectives",
    "commands": "one story a command",
    "cli": "the command line",
}
"""Folders of the package in the order of imports, with what each is for."""


ENTRIES: dict[str, type[BaseModel]] = {
    "data.domains.NAME": Domain,
    "train.stages.N": Stage,
    "train.rampup_batch_size": BatchRamp,
}
"""Sections that a mapping or a list holds any number of, by their place."""


def settings_page() -> str:
    """Return docs/settings.md."""
    sections = [_section(name, field) for name, field in RunConfig.model_fields.items()]
    return HEAD_OF_SETTINGS + "".join(sections)


def _section(name: str, field: FieldInfo) -> str:
    model: Any = field.annotation
    text = f"\n## {name}\n\n{_text(model.__doc__)}\n\n{_table(name, model)}"
    for place, entry in ENTRIES.items():
        if place.startswith(f"{name}."):
            text += f"\n### {place}\n\n{_text(entry.__doc__)}\n\n" + _table(place, entry)
    return text


def _table(prefix: str, model: type[BaseModel]) -> str:
    rows: list[tuple[str, ...]] = []
    nested = ""
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            nested += f"\n### {prefix}.{name}\n\n{_text(kind.__doc__)}\n\n"
            nested += _table(f"{prefix}.{name}", kind)
            continue
        rows.append((f"`{prefix}.{name}`", _type(kind), _default(field), _text(field.description)))
    return markdown_table(("setting", "type", "default", "meaning"), rows) + nested


def _type(kind: Any) -> str:
    """Return a type as a reader of YAML would say it."""
    arguments = get_args(kind)
    if kind is type(None):
        return "null"
    if get_origin(kind) is dict:
        of_sections = isinstance(arguments[1], type) and issubclass(arguments[1], BaseModel)
        return "mapping of names to " + ("sections" if of_sections else "numbers")
    if get_origin(kind) is list:
        return f"list of {_type(arguments[0])}"
    if hasattr(kind, "__metadata__"):
        return _type(arguments[0])
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return ", ".join(f"`{argument}`" for argument in arguments)
    if arguments:
        return " or ".join(_type(argument) for argument in arguments)
    if issubclass(kind, BaseModel):
        return "section" if kind is BatchRamp else "sections"
    names = {"int": "integer", "float": "number", "bool": "true or false", "Path": "path",
             "str": "text"}  # fmt: skip
    return names[kind.__name__]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "null"
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"`{value}`"


def _text(text: str | None) -> str:
    """Return a docstring in one line; lines of a list in it are kept apart."""
    lines = [line.strip() for line in (text or "").strip().splitlines()]
    paragraphs = "\n".join(lines).split("\n\n")
    joined = [" ".join(paragraphs[0].splitlines())]
    joined += ["<br>".join(_items(paragraph)) for paragraph in paragraphs[1:]]
    return "<br><br>".join(joined)


def _items(paragraph: str) -> list[str]:
    """Return a list of ``name   meaning`` lines, with continued lines joined."""
    items: list[str] = []
    for line in paragraph.splitlines():
        name, gap, meaning = line.partition("  ")
        if gap:
            items.append(f"`{name}`: {meaning.strip()}")
        elif items:
            items[-1] += f" {line}"
        else:
            items.append(line)
    return items


def architecture_page() -> str:
    """Return docs/architecture.md."""
    text = HEAD_OF_ARCHITECTURE
    for folder, purpose in FOLDERS.items():
        here = ROOT / "megatron_moe" / folder
        files = sorted(path for path in here.glob("*.py") if path.name != "__init__.py")
        title = f"`{folder}/`" if folder else "`megatron_moe/`"
        rows = ((f"`{path.name}`", _summary(path)) for path in files)
        text += f"\n## {title}: {purpose}\n\n{markdown_table(('file', 'what it does'), rows)}"
    return text


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


TINY = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 257, "sliding_window": None,
}  # fmt: skip
MOES = {
    "all layers MoE": {},
    "some layers dense": {"first_dense_layers": 1},
    "shared expert": {"moe_shared_expert_intermediate_size": 32},
    "router_order softmax_topk": {"router_order": "softmax_topk"},
    "sigmoid scores": {"moe_router_score_function": "sigmoid"},
}
"""Kinds of MoE that are exported to different classes."""


def models_page() -> str:
    """Return docs/models.md."""
    variants = [(f"`{family}`", f"`{row.architecture}`", _variant(row), _names(row))
                for family, row in FAMILIES.items()]  # fmt: skip
    targets = [(f"`{family}`", *(_target(row, moe) for moe in MOES.values()))
               for family, row in FAMILIES.items() if row.moe is None]  # fmt: skip
    tested = [(f"`{name}`", family, f"`{json.dumps(changes)}`" if changes else "")
              for name, (family, changes) in TESTED.items()]  # fmt: skip
    return (
        HEAD_OF_MODELS
        + markdown_table(("family", "class in transformers", "differs from Llama", "tensors"),
                         variants)
        + "\n## Exports\n\nClass that `megatron-moe export` writes, by the kind of MoE. `-`: no "
        "class of transformers computes the same; the checkpoint stays usable. A run that starts "
        "from a MoE is exported as the class of its source.\n\n"
        + markdown_table(("family", *MOES), targets)
        + "\n## Variants of all families\n\n"
        f"Rotary scaling: {', '.join(f'`{kind}`' for kind in ROPE_TYPES)}, as `rope_scaling` or "
        "`rope_parameters`, and a top-level `original_max_position_embeddings`. With `dynamic`, "
        "`data.seq_length` must be at most `max_position_embeddings`; with a sliding window, at "
        "most the window. Tied embeddings may be saved under either name. Refused, with the "
        "reason: `attention_bias`, `mlp_bias`, other activations than SiLU, partial rotation.\n"
        "\nGranite's multipliers apply while the model trains, so that weights and learning rates "
        "mean what they meant to the source. The export has them in its weights: `o_proj` and "
        "`down_proj` times residual / embedding multiplier, `q_proj` times attention multiplier * "
        "sqrt(head width), the final norm divided by `logits_scaling`, and `rms_norm_eps` divided "
        "by the square of the embedding multiplier. It is the same function in exact arithmetic; "
        "bf16 rounds the multiplied weights once more, `--dtype fp32` does not.\n"
        "\nGranite and OLMo-2 were tested with the torch engine on CPUs. Their layers have not "
        "been built with Transformer Engine.\n"
        "\nMoE families are read in two spellings: one tensor per expert, and tensors that stack "
        "all experts of a layer, as transformers 5 may save them.\n"
        "\n## Refused by name\n\n"
        + markdown_table(("class in transformers", "it has"),
                         ((f"`{name}`", reason) for name, reason in REFUSED.items()))
        + "\n## Tested with\n\nSmall random models of these shapes; logits equal those of "
        "transformers to 1e-4 under one rank, tp2 x ep4 and pp2 "
        "(`tests/distributed/test_parity.py`), those of MoE models under one rank and "
        "tp2 x ep2 x etp2 (`tests/distributed/test_moe_source.py`). `tests/field/` has the "
        "variants above.\n\n"
        + markdown_table(("model", "family", "changes"), tested)
    )  # fmt: skip


def _variant(row: FamilyRow) -> str:
    windows = {"ignored": "", "always": "sliding window", "all_on_request": "sliding window"}
    rotary = "layers without rotary embedding" * row.skips_rotary
    norms = "norms of q and k" + (" over all heads" if row.qk_norm_spans_heads else "")
    biases = _on_request("biases of q, k, v", row.qkv_bias)
    order = "norms after attention and FFN instead of before" * row.post_norms
    constants = "four multipliers" * row.multipliers
    parts = [rotary, biases, order, _on_request(norms, row.qk_layernorm), constants,
             windows.get(row.windows, "sliding window in some layers"), *_experts(row)]  # fmt: skip
    return ", ".join(part for part in parts if part) or "-"


def _on_request(what: str, property_or_key: bool | str) -> str:
    if isinstance(property_or_key, str):
        return f"{what} if `{property_or_key}`"
    return what if property_or_key else ""


def _experts(row: FamilyRow) -> list[str]:
    """Describe the experts of a MoE family."""
    moe = row.moe
    if moe is None:
        return []
    scores = "sigmoid scores with expert biases" if moe.sigmoid else "softmax"
    order = {None: " (`norm_topk_prob`)", True: " over the chosen experts", False: ""}
    dense = {"none": "", "qwen": "some layers dense", "first": "first layers dense"}
    shared = "shared expert" if moe.shared_size or moe.shared_count else ""
    return [
        "**MoE**: " + scores + ("" if moe.sigmoid else order[moe.renormalizes]),
        dense[moe.dense_layers],
        shared + (" with a gate" if moe.shared_gate else ""),
    ]


def _names(row: FamilyRow) -> str:
    short = [name.rpartition("}.")[2] for name in row.tensors]
    return "stacked: " + ", ".join(f"`{name}`" for name in short) if short else "Llama's"


def _target(row: FamilyRow, changes: dict[str, Any]) -> str:
    spec = spec_from_config({"architectures": [row.architecture], **TINY})
    try:
        architecture = architecture_for(spec, Moe(num_moe_experts=4, **changes))
    except CheckpointError:
        return "-"
    return f"`{architecture}`"


def main() -> None:
    """Write all pages."""
    MODELS.write_text(models_page())
    SETTINGS.write_text(settings_page())
    ARCHITECTURE.write_text(architecture_page())


if __name__ == "__main__":
    main()
