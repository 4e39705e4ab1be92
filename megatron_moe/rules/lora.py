"""Rules of low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.parts import layers_of_name
from megatron_moe.config.train import Lora
from megatron_moe.rules.case import Case


def adapters(case: Case) -> Iterator[str]:
    """Check that adapters have targets and a useful rank, and that other settings belong to any."""
    lora, size = case.config.lora, case.spec.hidden_size
    if not lora.rank:
        for name in ("alpha", "targets"):
            if (value := getattr(lora, name)) != Lora.model_fields[name].default:
                yield (
                    f"lora.{name} ({value}) has no effect without lora.rank.\n"
                    f"  set lora.rank, or leave lora.{name} unset"
                )
        return
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        yield (
            f"lora.rank ({lora.rank}) needs lora.targets ({', '.join(lora.targets) or 'none'}) to "
            "name each role once, and at least one.\n  set lora.targets=[attention]"
        )
    if lora.rank > size:
        yield (
            f"lora.rank ({lora.rank}) must be at most hidden_size ({size}): an update of a weight "
            f"has no larger rank.\n  largest lora.rank: {size}"
        )
    for setting in ("lr_multipliers", "weight_decay_multipliers"):
        for name in getattr(case.config.optimizer, setting):
            if layers_of_name(name)[0] in lora.targets:
                yield (
                    f"optimizer.{setting} names {name}, but with lora.rank ({lora.rank}) its "
                    "weights are frozen: adapters are trained in their place.\n"
                    f"  name adapters in optimizer.{setting} instead"
                )


def alone(case: Case) -> Iterator[str]:
    """Check that nothing is set that does not know adapters."""
    lora, train, run = case.config.lora, case.config.train, case.config.run
    if not lora.rank:
        return
    if "experts" in lora.targets and run.engine != "torch" and run.device != "cpu":
        yield (
            f"lora.targets (experts) needs run.engine ({run.engine}) to be torch: Transformer "
            "Engine multiplies all experts at once, and has no place for their adapters.\n"
            "  set run.engine=torch, or lora.targets=[attention]"
        )
    revival = case.config.moe.revive_after_steps if "experts" in lora.targets else None
    for name, value, unset, why in (
        ("optimizer.optimizer", case.config.optimizer.optimizer, "adam",
         "Muon orthogonalizes the update of a weight, which is not that of its two factors"),
        ("train.fp8", train.fp8, None, "the adapters' products would stay in bf16"),
        ("train.tp_comm_overlap", train.tp_comm_overlap, False,
         "its buffers are for projections that contain their norm"),
        ("train.overlap_moe_expert_parallel_comm", train.overlap_moe_expert_parallel_comm, False,
         "adapters in layers that run piece by piece have not been tried"),
        ("moe.revive_after_steps", revival, None,
         "a copy of an expert's frozen weights is not the expert without its adapters"),
        ("source.optimizer_state", case.config.source.optimizer_state, None,
         "adapters have no moments in the source's run"),
    ):  # fmt: skip
        if value != unset:
            shown = "true" if value is True else value
            yield (
                f"lora.rank ({lora.rank}) cannot be combined with {name} ({shown}): {why}.\n"
                f"  leave {name} unset, or lora.rank"
            )


def whole_experts(case: Case) -> Iterator[str]:
    """Check that experts with adapters are not sharded."""
    lora, etp = case.config.lora, case.config.parallel.expert_tensor_parallel_size
    if "experts" in lora.frozen and etp > 1:
        yield (
            f"lora.targets (experts) needs parallel.expert_tensor_parallel_size ({etp}) to be 1: "
            "adapters of experts are not sharded.\n"
            "  set parallel.expert_tensor_parallel_size=1, or lora.targets=[attention]"
        )
