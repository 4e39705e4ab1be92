"""Write the README.md of an exported model: what it is, where it comes from, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_moe import __version__
from megatron_moe.checkpoint.folder import Progress
from megatron_moe.config.moe import Upcycle
from megatron_moe.config.run import RunConfig
from megatron_moe.config.train import Lora
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.names import MOE_NAMES
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.report.history import read_history

_LOSSES = ("loss/lm", "loss/validation", "perplexity/validation", "bits_per_byte/validation")


def model_card(
    *,
    config: RunConfig,
    spec: ModelSpec,
    progress: Progress,
    tokens: int,
    architecture: str,
    dtype: str,
    run_dir: Path,
    name: str,
    title: str | None = None,
) -> str:
    """Return the text of the card.

    Args:
        config: The run.
        spec: Shape of the source model.
        progress: The checkpoint's progress.
        tokens: Tokens that the model was trained on after upcycling.
        architecture: Class of transformers that loads the export.
        dtype: dtype of the weights.
        run_dir: Folder of the run, for its receipt and metrics.
        name: Name of the folder or of the repository, to load it by.
        title: Heading of the card; None uses the name.
    """
    moe, dense = config.moe, architecture not in MOE_NAMES
    rows = {
        "source model": f"{config.source.path.name} ({spec.family}, {spec.num_layers} layers)",
        "construction": f"`{config.upcycle.method}`, {moe.num_moe_experts} experts of "
        f"{moe.moe_ffn_hidden_size or spec.ffn_hidden_size} neurons, top-{moe.moe_router_topk}",
        "shared expert": str(moe.moe_shared_expert_intermediate_size or "none"),
        "training": f"{progress.step} steps, {tokens:,} tokens, precision {config.train.precision}",
        **_solved(config.upcycle),
        **_teacher(config),
        **_adapters(config.lora),
        "weights": dtype,
        "architecture": f"`{architecture}`",
        **_losses(run_dir / "metrics.jsonl", progress.step),
        **_receipt(run_dir / "receipt.json"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags:{'' if dense else '\n- moe'}\n- upcycling\n---\n\n"
        f"# {title or name}\n\n"
        f"A {'dense' if dense else 'Mixture-of-Experts'} model, built from the source model and "
        f"trained further by megatron_moe {__version__}.\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n"
        "Losses are nats per token. Weights of the source model come with its license.\n\n"
        "## Load it\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        "```\n"
    )


def _solved(upcycle: Upcycle) -> dict[str, str]:
    """Return a row about what was solved for before training, if anything was."""
    return {"solved for on text": ", ".join(sorted(set(upcycle.fit)))} if upcycle.fit else {}


def _teacher(config: RunConfig) -> dict[str, str]:
    """Return a row about the teacher, if the run has one."""
    teacher = config.teacher
    weights = {
        "logits": teacher.logits_weight,
        "layers": teacher.layers_weight,
        "router": teacher.router_weight,
    }
    used = [f"{name} {weight:g}" for name, weight in weights.items() if weight]
    name = (teacher.path or config.source.path).name
    return {"teacher": f"{name}, weights: {', '.join(used)}"} if used else {}


def _adapters(lora: Lora) -> dict[str, str]:
    """Return a row about adapters, if the run has any."""
    if not lora.rank:
        return {}
    targets = ", ".join(lora.targets)
    return {"adapters": f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {targets}; merged"}


def _losses(metrics: Path, step: int) -> dict[str, str]:
    """Return the last value of each loss up to ``step``."""
    result: dict[str, str] = {}
    for numbers in read_history(metrics).lines:
        for key in _LOSSES:
            if numbers["step"] <= step and numbers.get(key) is not None:
                result[f"{key}, step {numbers['step']}"] = f"{numbers[key]:.4f}"
                for old in [k for k in result if k.startswith(f"{key},")][:-1]:
                    del result[old]
    return result


def _receipt(path: Path) -> dict[str, str]:
    """Return what the receipt says about the upcycling's agreement with the source."""
    if not path.exists():
        return {}
    try:
        receipt: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{path}, which the model card quotes, is damaged: {error}\n"
            "  move it away to export without it"
        ) from error
    rows = {"tensors of the source": str(receipt.get("tensors_covered"))}
    if agreement := receipt.get("verification"):
        rows["max logit error against the source at step 0"] = (
            f"{agreement['max_logit_error']:.2e} over {agreement['tokens']} tokens"
        )
    return rows
