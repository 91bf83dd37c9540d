"""Files that are whole or not there: written under another name, made to last, then renamed."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any


def json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("utf-8")


def hidden_sibling(path: pathlib.Path, purpose: str) -> pathlib.Path:
    """Always the same name, so that what a killed process left is found and not piled up."""
    return path.with_name(f".{path.name}.{purpose}")


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames within a folder last; a no-op where folders cannot be opened (Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames `source` to `folder`. One that is there is moved aside first, then deleted."""
    old = hidden_sibling(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(source, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def describe(folder: pathlib.Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage(folder: pathlib.Path, recorded: Mapping[str, Any]) -> str | None:
    """Which files are no longer as `describe` found them, in words; None if all are."""
    found = describe(folder)
    names = sorted(name for name in {*found, *recorded} if found.get(name) != recorded.get(name))
    if not names:
        return None
    return (
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing or not what was written"
    )


def _checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
