"""The wheel works without this repository: it is installed elsewhere and trains on two ranks."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny import save_dense
from training_runs import read_metrics, tree, write_tokens

from megatron_moe import __version__

ROOT = Path(__file__).parents[1]
SEPARATE_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python")

pytestmark = pytest.mark.network  # building a wheel fetches hatchling


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of `make package`. Its environment is this one, so it is not brought up to date."""
    out = tmp_path_factory.mktemp("dist")
    command = ["make", "--old-file=.venv/.installed", "package", f"DIST={out}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment that has our dependencies, and of us the wheel alone.

    A .pth file shows it the packages of the project's environment. The .pth files there, through
    which an editable install finds the repository, are not read from a folder that is added so.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (own / "project.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([*SEPARATE_PIP, str(python), *install], check=True, timeout=300)
    return folder / "bin" / "megatron-moe"


def run(command: Path, *args: object, cwd: Path) -> str:
    """Run the installed program in another folder, without any path of this process."""
    hidden = ("PYTHON", "COVERAGE", "RANK", "WORLD_SIZE", "SLURM")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        [str(command), *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_alone(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"megatron_moe-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"megatron_moe", metadata}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_moe").rglob("*.py")}
    assert files <= set(names)
    others = {name for name in names if name.startswith("megatron_moe/")} - files
    data = ("hf/known_models.yaml", "py.typed", "report/page.css")
    assert others == {f"megatron_moe/{name}" for name in data}


def test_the_program_is_the_wheels(installed: Path, tmp_path: Path):
    script = "import megatron_moe; print(megatron_moe.__file__)"
    where = Path(run(installed.with_name("python"), "-c", script, cwd=tmp_path).strip())
    assert where.is_relative_to(installed.parents[1])


def test_help_version_and_schema(installed: Path, tmp_path: Path):
    assert "generate" in run(installed, "--help", cwd=tmp_path)
    assert run(installed, "--version", cwd=tmp_path) == f"megatron-moe {__version__}\n"
    schema = json.loads(run(installed, "schema", cwd=tmp_path))
    assert {"run", "source", "moe"} <= set(schema["properties"])


@pytest.mark.distributed
def test_two_ranks_train(installed: Path, tmp_path: Path):
    dense, tokens = save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens")
    settings = tree(
        tmp_path / "run", dense, tokens, train={"steps": 2}, parallel={"expert_parallel_size": 2}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    out = run(installed, "train", "run.yaml", "--ranks", 2, cwd=tmp_path)
    assert "step 2/2" in out
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss/lm" in line] == [1, 2]
