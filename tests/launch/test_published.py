"""launch/kubernetes.yaml and launch/skypilot.yaml use only fields that their programs publish."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
SKYPILOT = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
DOCUMENTS = {document["kind"]: document for document in KUBERNETES} | {"SkyPilot": SKYPILOT}
TYPES = {"string": str, "integer": int, "boolean": bool, "quantity": (int, str)}


def violations(value: Any, published: Any, where: str = "") -> list[str]:
    """Return the fields that are not published, or have another type."""
    if isinstance(published, str):
        right = isinstance(value, TYPES[published])
        right &= isinstance(value, bool) == (published == "boolean")
        return [] if right else [f"{where} must be of type {published}"]
    if type(value) is not type(published):
        return [f"{where} must be of type {type(published).__name__}"]
    if isinstance(value, list):
        return [v for item in value for v in violations(item, published[0], f"{where}[]")]
    result = []
    for name, item in value.items():
        field = published.get(name, published.get("*"))
        path = f"{where}.{name}"
        result += [f"{path} is unknown"] if field is None else violations(item, field, path)
    return result


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_only_published_fields_are_used(kind: str):
    assert violations(DOCUMENTS[kind], PUBLISHED[kind]) == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("TrainJob", "spec trainer nodes", 2, ".spec.trainer.nodes is unknown"),
        ("TrainJob", "spec runtimeRef name", 2, ".spec.runtimeRef.name must be of type string"),
        ("TrainingRuntime", "spec mlPolicy torch", [], ".spec.mlPolicy.torch must be of type dict"),
        ("SkyPilot", "resources use_spot", 1, ".resources.use_spot must be of type boolean"),
        ("SkyPilot", "num_nodes", True, ".num_nodes must be of type integer"),
        ("SkyPilot", "envs DATA", 3, ".envs.DATA must be of type string"),
    ],
)  # fmt: skip
def test_another_field_or_type_is_found(kind: str, path: str, value: Any, message: str):
    document = copy.deepcopy(DOCUMENTS[kind])
    *parents, name = path.split()
    inner = document
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    assert violations(document, PUBLISHED[kind]) == [message]


def test_the_skypilot_task_fits_its_configuration():
    gpus = SKYPILOT["num_nodes"] * int(SKYPILOT["resources"]["accelerators"].partition(":")[2])
    config = SKYPILOT["envs"]["CONFIG"]
    assert gpus == int(Path(config).stem.rpartition("-")[2])
    assert (ROOT / config).exists()
    for name in ("RUN_DIR", "SOURCE", "DATA"):
        assert any(
            SKYPILOT["envs"][name].startswith(f"{folder}/") for folder in SKYPILOT["volumes"]
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_skypilot_task_starts_nodes_sh_on_each_node(tmp_path: Path, rank: int):
    """Run its commands with the variables that SkyPilot sets; torchrun is a stand-in."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "run.yaml").touch()
    python = tmp_path / "python"
    own = f'[[ $1 == -c ]] && exec {sys.executable} "$@"'
    python.write_text(f'#!/bin/bash\n{own}\necho "$@"\nenv | grep SOCKET_IFNAME\n')
    python.chmod(0o755)
    env = {
        **SKYPILOT["envs"], "CONFIG": "run.yaml", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHON": str(python), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "192.0.2.7\n127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", SKYPILOT["run"]],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments, *interfaces = done.stdout.splitlines()
    expected = {"--nnodes": "2", "--nproc-per-node": "8", "--rdzv-endpoint": "192.0.2.7:29400"}
    expected["--local-addr"] = ("192.0.2.7", "127.0.0.1")[rank]
    words = arguments.split()
    assert {name: words[words.index(name) + 1] for name in expected} == expected
    assert words[-5:] == [
        "train", "run.yaml", "run.dir=/shared/runs/llama3-8b-e8t2",
        "source.path=/shared/models/Meta-Llama-3-8B", "data.path=/shared/data/train",
    ]  # fmt: skip
    if rank == 1:  # the address that this machine has
        assert sorted(interfaces) == ["GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo"]
