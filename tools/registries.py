"""Download and unpack packages of npm and Debian with their clients, without installing them.

No code of a package is run: ``npm pack`` downloads the archive, ``apt-get download`` a .deb whose
signature chain apt has checked, and ``dpkg-deb`` unpacks it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.errors import UserError


def npm_package(name: str, *, sha256: str, to: Path, cache: Path) -> Path:
    """Unpack an npm package below ``to`` and return its folder.

    Raises:
        UserError: It cannot be downloaded, or its hash is not ``sha256``.
    """
    stem = name.removeprefix("@").replace("/", "-").rpartition("@")
    archive = cache / f"{stem[0]}-{stem[2]}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {name} from npm", flush=True)
        _run(["npm", "pack", "--silent", name], cache, f"get {name} from npm")
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != sha256:
        archive.unlink()
        raise UserError(
            f"{archive.name} is not the expected archive: sha256 {actual}, expected {sha256}.\n"
            "  It was removed from the cache; run the same command again. If this repeats, the\n"
            "  registry serves another file under this version: do not use it."
        )
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    return to / "package"


def debian_packages(names: Sequence[str], *, to: Path, cache: Path) -> Path:
    """Unpack Debian packages of this system's release into ``to`` and return it.

    Raises:
        UserError: A package cannot be downloaded.
    """
    folder = cache / "debian"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not _deb(folder, name)]
    if missing:
        print(f"Downloading {', '.join(missing)} with apt-get", flush=True)
        # As root, apt downloads as its own user, who may not write here; apt reports that.
        _run(["apt-get", "download", "-qq", *missing], folder, f"get {', '.join(missing)}")
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        deb = _deb(folder, name)
        if deb is None:
            raise UserError(f"apt-get did not download {name} to {folder}")
        _run(["dpkg-deb", "--extract", str(deb), str(to)], folder, f"unpack {deb.name}")
    return to


def _deb(folder: Path, name: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)


def _run(command: list[str], folder: Path, purpose: str) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(
            f"cannot {purpose}: there is no {command[0]} on this machine.\n"
            "  Use your own text instead: --local FOLDER"
        )
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        details = "\n".join(f"  {command[0]}: {line}" for line in done.stderr.splitlines()[-3:])
        raise UserError(
            f"cannot {purpose}.\n{details}\n"
            "  Check the network (run apt-get update once), or use your own text:\n"
            "  --local FOLDER"
        )
