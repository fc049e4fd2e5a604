"""Fresh API keys for a server and those who ask it: one file that the server reads, and one for each of them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from lift_cache.errors import BadConfig
from lift_cache.files import room_for
from lift_embedder.access import Scope

SERVER = "server"
"""Name of the file with all keys."""


def make_keys(folder: Path, wanted: Mapping[str, Scope]) -> list[str]:
    """Write keys that are not there yet; those that are stay as they are.

    FOLDER/server has a line `NAME SCOPE KEY` for each, for `--keys-file`, and may be read by its owner alone.
    FOLDER/NAME has one key, for LIFT_API_KEY_FILE, and may be read by the group too.

    Args:
        wanted: name → scope.

    Returns:
        Names of the keys that were made.

    Raises:
        BadConfig: the folder cannot be written, or a name that cannot be.
        CacheFull: no room.
    """
    for name in wanted:
        if name == SERVER or not name.replace("-", "").replace("_", "").isalnum():
            raise BadConfig(f"--name {name}: letters, digits, - and _, and not {SERVER!r}")
    made = []
    try:
        with room_for(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name in wanted:
                if not (folder / name).exists():
                    _write(folder / name, secrets.token_urlsafe(32) + "\n", 0o640)
                    made.append(name)
            lines = [
                f"{name} {scope.name.lower()} {(folder / name).read_text().strip()}"
                for name, scope in wanted.items()
            ]
            _write(folder / SERVER, "\n".join(lines) + "\n", 0o600)
    except OSError as error:
        raise BadConfig(f"{folder} cannot take keys: {error.strerror or error}") from None
    return made


def _write(path: Path, text: str, mode: int) -> None:
    """Whole or not at all, and never readable by more than `mode` says."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
