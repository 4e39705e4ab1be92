"""Which wheels a machine with torch and transformers lacks, and their pinned versions.

    python tools/gpu_check.py --wheels > wheels.txt
    pip download --no-deps --only-binary=:all: --dest wheels --requirement wheels.txt
    for wheel in wheels/*.whl; do unzip -q -o $wheel -d packages; done

The list is what the package and the checks import, and what those packages require, without what
the machine has.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PRESENT = (
    "torch", "triton", "transformers", "numpy", "pyyaml", "safetensors", "tokenizers",
    "huggingface-hub", "regex", "packaging", "jinja2", "markupsafe", "typing-extensions", "sympy",
    "mpmath", "networkx", "fsspec", "filelock", "tqdm", "requests", "setuptools", "pip",
)  # fmt: skip
"""Packages that a machine with torch and transformers has. Their other requirements are listed all
the same: an installation may lack them, and together they are small."""
OPTIONAL = ("wandb", "lm-eval", "accelerate", "pyarrow", "zstandard", "ortools", "matplotlib",
            "tensorboard", "datasets")  # fmt: skip
"""Packages that only features outside of the checks import."""


def missing_wheels() -> list[str]:
    """Return ``name==version`` of every wheel to bring, with versions of constraints.txt."""
    folders = (ROOT / "megatron_moe", ROOT / "tools" / "gpu_checks")
    modules = set(_imported(path for folder in folders for path in folder.rglob("*.py")))
    providers = metadata.packages_distributions()
    direct: set[str] = {
        canonicalize_name(name) for module in modules for name in providers.get(module, ())
    }
    needed = _with_requirements(direct - {"megatron-moe"})
    pinned = _pinned()
    return [f"{name}=={pinned[name]}" for name in sorted(needed)]


def _imported(files: Iterable[Path]) -> Iterator[str]:
    """Yield the top-level names of the modules that files import, inside functions too."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            yield from (
                top for name in names
                if (top := name.partition(".")[0]) not in sys.stdlib_module_names
            )  # fmt: skip


def _with_requirements(names: set[str]) -> set[str]:
    """Return the distributions and what they require, as far as the machine lacks them."""
    seen: set[str] = set()
    waiting = names - {*PRESENT, *OPTIONAL}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.add(canonicalize_name(requirement.name))
        waiting -= {*seen, *PRESENT, *OPTIONAL}
    return seen


def _pinned() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}
