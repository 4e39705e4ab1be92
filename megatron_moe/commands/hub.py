"""Push an exported folder to a Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_moe.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def hub_for(name: str) -> Any:
    """Return the client of a hub that can be reached and that knows this user.

    This comes before the export, which takes longer.

    Raises:
        ConfigError: The name is not that of a repository, or the hub cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--push-to-hub ({name}) must be the name of a repository: NAME or OWNER/NAME of "
            "letters, digits, '-', '_' and '.'"
        )
    from huggingface_hub import HfApi  # imported here: it takes a moment

    api: Any = HfApi()
    try:
        api.whoami()
    except Exception as error:  # offline mode, no token, no network: each raises its own kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--push-to-hub ({name}) needs a hub that can be reached, and a login: {reason}.\n"
            "  log in with `hf auth login`; or export without the option, and upload the folder "
            "from a machine with access"
        ) from error
    return api


def push(api: Any, name: str, folder: Path) -> str:
    """Upload a folder to the repository ``name``, which is created as private if it is missing.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: The upload failed; the folder is complete all the same.
    """
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=str(folder))
    except Exception as error:
        raise ConfigError(
            f"cannot upload to {name}: {error}.\n  {folder} is complete; upload it again later"
        ) from error
    return str(address)
