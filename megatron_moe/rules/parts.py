"""Rules of settings that name parts of the model: freezing, stages, multipliers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations

from megatron_moe.config.parts import ROLE_NAMES, Frozen, Role, layers_of_name
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.rules.case import Case


def roles(case: Case) -> Iterator[str]:
    """Check that settings by role name roles of this model, and that something is trained."""
    train, optimizer = case.config.train, case.config.optimizer
    present = _present_roles(case)
    lists = {"train.freeze": train.freeze}
    lists |= {f"train.stages.{i}.freeze": stage.freeze for i, stage in enumerate(train.stages)}
    for name, named in (
        *lists.items(),
        ("optimizer.lr_multipliers", optimizer.lr_multipliers),
        ("optimizer.weight_decay_multipliers", optimizer.weight_decay_multipliers),
    ):
        if absent := [part for part in named if not _exists(part, present)]:
            layers = f"; layers 0 to {case.spec.num_layers - 1}" if "@" in "".join(absent) else ""
            yield (
                f"{name} names {', '.join(absent)}, but this model has no such parameters.\n"
                f"  its roles: {', '.join(present)}{layers}"
            )
    for name, named in lists.items():
        frozen = Frozen.named(named).with_roles(case.config.lora.frozen)
        if all(_nothing_trained(role, layers, frozen) for role, layers in present.items()):
            yield (
                f"{name} ({', '.join(named)}) freezes all parameters: nothing is left to train.\n"
                "  leave out at least one role"
            )
    for name, factors in (
        ("optimizer.lr_multipliers", optimizer.lr_multipliers),
        ("optimizer.weight_decay_multipliers", optimizer.weight_decay_multipliers),
    ):
        if twice := _overlapping(factors):
            yield (
                f"{name} names {' and '.join(twice)}, which have parameters in common.\n"
                "  name each layer of a role once"
            )
    for name in optimizer.weight_decay_multipliers:
        if layers_of_name(name)[0] == "norms":
            yield (
                f"optimizer.weight_decay_multipliers names {name}, which have no weight decay.\n"
                f"  remove {name} from optimizer.weight_decay_multipliers"
            )


def stages(case: Case) -> Iterator[str]:
    """Check that every stage but the last has a length, and that each of them is reached."""
    train = case.config.train
    if not train.stages:
        return
    if train.freeze:
        yield (
            f"train.freeze ({', '.join(train.freeze)}) and train.stages both say what is frozen: a "
            "stage has its own list.\n  remove train.freeze, or add its roles to each stage"
        )
    for index, stage in enumerate(train.stages):
        last = index == len(train.stages) - 1
        if (stage.steps is None) != last:
            yield (
                f"train.stages.{index}.steps ({stage.steps}) must be "
                f"{'unset' if last else 'set'}: each stage has a length but the last, which takes "
                "the rest of train.steps.\n"
                f"  {'remove it, or add a stage' if last else 'set it to a number of steps'}"
            )
    before = train.stage_starts()[-1]
    if train.steps and before >= train.steps:
        yield (
            f"train.stages before the last have {before} steps, which must be fewer than "
            f"train.steps ({train.steps}): otherwise the last stage never begins.\n"
            f"  smallest train.steps: {before + 1}"
        )


def _present_roles(case: Case) -> dict[Role, Collection[int]]:
    """Return the roles that have parameters in this model, and the layers that have them."""
    moe, every = case.config.moe, range(case.spec.num_layers)
    routed = moe_layer_ids(moe, case.spec.num_layers)
    dense = [layer for layer in every if layer not in routed]
    layers: dict[Role, Collection[int]] = dict.fromkeys(ROLE_NAMES, routed)
    layers |= {"attention": every, "norms": every, "embeddings": (), "dense_ffn": dense}
    layers["adapters"] = every if "attention" in case.config.lora.targets else routed
    absent = {
        "shared_experts": not moe.shared_size,
        "dense_ffn": not dense,
        "adapters": not case.config.lora.rank,
    }
    return {role: layers[role] for role in ROLE_NAMES if not absent.get(role)}


def _exists(name: str, present: Mapping[Role, Collection[int]]) -> bool:
    role, layers = layers_of_name(name)
    return role in present and all(layer in present[role] for layer in layers or ())


def _overlapping(names: Collection[str]) -> list[str]:
    """Return the first two names that have parameters in common; nothing if there are none."""
    for one, other in combinations(names, 2):
        (role, layers), (other_role, others) = layers_of_name(one), layers_of_name(other)
        if role == other_role and (not layers or not others or set(layers) & set(others)):
            return [one, other]
    return []


def _nothing_trained(role: Role, layers: Collection[int], frozen: Frozen) -> bool:
    """Return whether a role is frozen, and, if it has parameters outside of layers, those too."""
    if role in ("norms", "embeddings"):
        return role in frozen
    return not frozen.trained(role, layers)
