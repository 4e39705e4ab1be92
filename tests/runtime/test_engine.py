"""Tests of the engine: which layers a run uses and why, and its error messages."""

from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import tree

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.runtime import engine as engine_module
from megatron_moe.runtime.engine import (
    TORCH_ON_CUDA,
    check_capability,
    choose_engine,
    engine_before_forking,
    engine_of,
    problem_with,
)
from megatron_moe.runtime.stand_in import simulated_rank
from megatron_moe.runtime.world import World

ABSENT = "Transformer Engine is not installed"


@pytest.mark.parametrize(
    ("wanted", "device", "problem", "name", "reason"),
    [
        ("auto", "cpu", None, "torch", "the run is on the CPU"),
        ("torch", "cpu", None, "torch", "the run is on the CPU"),
        ("auto", "cuda", ABSENT, "torch", ABSENT),
        ("auto", "cuda", None, "transformer_engine", "version 2.20.2; installed"),
        ("torch", "cuda", None, "torch", "requested by run.engine"),
        ("transformer_engine", "cuda", None, "transformer_engine",
         "version 2.20.2; requested by run.engine"),
    ],
)  # fmt: skip
def test_the_engine_follows_device_setting_and_installation(
    monkeypatch: pytest.MonkeyPatch, wanted, device, problem, name: str, reason: str
):
    monkeypatch.setattr(engine_module, "installed_version", lambda: "2.20.2")
    engine = choose_engine(wanted, device=device, problem=lambda: problem)
    assert (engine.name, engine.device, engine.reason) == (name, device, reason)


def test_transformer_engine_is_not_looked_for_where_it_does_not_matter():
    def unexpected() -> str | None:
        raise AssertionError("importing it takes seconds")

    for wanted, device in (("auto", "cpu"), ("torch", "cuda")):
        choose_engine(wanted, device=device, problem=unexpected)


def test_an_engine_without_kernels_for_the_device_is_refused():
    with pytest.raises(ConfigError) as caught:
        choose_engine("transformer_engine", device="cpu", problem=lambda: None)
    assert str(caught.value) == (
        "run.engine (transformer_engine) requires run.device=cuda, but this run uses the CPU: "
        "Transformer Engine has no CPU kernels.\n  set run.engine=torch or run.engine=auto"
    )


@pytest.mark.parametrize(
    ("version", "error", "problem"),
    [
        (None, None, ABSENT),
        ("1.13.0", None, "Transformer Engine 1.13.0 is outside the supported versions <3,>=2.20"),
        ("2.20.2", "ImportError: libcudnn.so.9", "Transformer Engine 2.20.2 cannot be imported "
         "(ImportError: libcudnn.so.9)"),
        ("2.20.2", None, None),
        ("2.21.0.dev0+abc", None, None),
    ],
)  # fmt: skip
def test_each_problem_is_named(monkeypatch: pytest.MonkeyPatch, version, error, problem):
    monkeypatch.setattr(engine_module, "installed_version", lambda: version)
    assert problem_with(lambda: error) == problem
    if problem is None:
        return
    with pytest.raises(ConfigError) as caught:
        choose_engine("transformer_engine", device="cuda", problem=lambda: problem)
    assert str(caught.value) == (
        f"run.engine (transformer_engine) cannot be used: {problem}.\n"
        "  install a version <3,>=2.20 (see docs/gpu.md), or set run.engine=torch, which "
        "needs only torch"
    )


def test_an_import_that_fails_is_tried_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The package fails while it loads, like one that was built for another torch version."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "transformer_engine_torch.py").touch()
    metadata = tmp_path / "transformer_engine-2.20.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: transformer-engine\nVersion: 2.20.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = engine_before_forking("auto", "cuda")
    assert engine.is_torch
    assert engine.reason == (
        "Transformer Engine 2.20.2 cannot be imported (ImportError: undefined symbol: _ZN3c10)"
    )


def test_ranks_that_would_differ_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Simulate two machines of which one has no Transformer Engine."""

    def on_rank(world: World) -> None:
        versions = {0: ABSENT, 1: None}
        monkeypatch.setattr(
            engine_module,
            "engine_here",
            lambda wanted, device: choose_engine(
                wanted, device="cuda", problem=lambda: versions[world.rank]
            ),
        )
        torch.cuda.get_device_name = lambda: "NVIDIA H100 80GB HBM3"
        torch.cuda.get_device_capability = lambda: (9, 0)
        pretended = World(world.rank, 2, world.rank, torch.device("cuda"), world.address)
        with pytest.raises(
            ConfigError, match="must resolve to the same engine on every rank"
        ) as caught:
            engine_of("auto", pretended)
        assert f"rank 0: torch ({ABSENT})" in str(caught.value)
        assert "rank 1: transformer_engine (version None" in str(caught.value)

    run_on_ranks(on_rank, world_size=2)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_gpu_of_ampere_or_newer_is_accepted(capability: tuple[int, int]):
    check_capability("a GPU", capability)


@pytest.mark.parametrize(
    ("name", "capability"), [("Tesla T4", (7, 5)), ("Tesla V100", (7, 0)), ("Tesla P100", (6, 0))]
)
def test_an_older_gpu_is_refused(name: str, capability: tuple[int, int]):
    with pytest.raises(ConfigError) as caught:
        check_capability(name, capability)
    assert str(caught.value) == (
        "run.device (cuda) requires a GPU of compute capability 8.0 or newer, but the "
        f"{name} has {capability[0]}.{capability[1]}: it has no bf16 matrix products and no flash "
        "attention.\n  use a newer GPU (A100, H100, or later), or set run.device=cpu"
    )


def test_a_rank_on_an_older_gpu_ends_before_it_chooses_an_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match=r"the Tesla T4 has 7\.5"):
        engine_of("torch", World(0, 1, 0, torch.device("cuda"), "127.0.0.1"))


@pytest.mark.parametrize("gate", ["linear", "noisy_mlp"])
def test_all_parameters_are_on_the_device(tmp_path: Path, gate: str):
    """The current device is "meta" here, so parameters left on the CPU are detected."""
    from megatron_moe.hf.spec import read_spec
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups

    folder = save_dense(tmp_path / "dense")
    settings = tree(tmp_path / "run", folder, tmp_path / "text",
                    moe={"num_moe_experts": 4, "router_gate": gate,
                         "moe_layers": [1]}, train={"precision": "bf16"})  # fmt: skip
    config = build(RunConfig, settings)
    with simulated_rank(0, world_size=1):
        layout, groups = create_groups(config.parallel, seed=0)
        model = build_model(
            config, read_spec(folder), layout=layout, groups=groups, rank=0, engine=TORCH_ON_CUDA
        )
        (module,) = model.modules
        devices = {name: p.device.type for name, p in module.named_parameters()}
    assert set(devices.values()) == {"meta"}, devices
