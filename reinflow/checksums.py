"""Digests of the files that we write, so that a change is noticed before it is used.

``checksums.json`` in a directory holds {file: [sha256, ...]}; a file is sound with any of its digests, as while one of
two versions takes the other's place.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

from reinflow import UserError

SUMS_FILE = "checksums.json"
FOR_PEOPLE = {"README.md"}  # may be edited


class DamagedFileError(UserError, ValueError):
    """A file is not what was written; the message names it and the remedy."""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=256)
def _digest_of(path: Path, _size: int, _changed: int) -> str:
    """Of a file that is looked at again and again; never of one that was just written: clocks tick coarsely."""
    return sha256(path)


def write_sums(directory: Path) -> None:
    """Write the digests of all files below a directory into it."""
    left_out = {SUMS_FILE, *FOR_PEOPLE}
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in left_out)
    sums = {path.relative_to(directory).as_posix(): [sha256(path)] for path in paths}
    (directory / SUMS_FILE).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def check_sums(directory: Path, remedy: str) -> None:
    """Compare the files of a directory with its checksums.json, if it has one.

    Raises:
        DamagedFileError: a file is missing or another one, or the sums cannot be read; it ends with ``remedy``.
    """
    _check(directory / SUMS_FILE, remedy)


def replace_with_sum(path: Path, content: str) -> None:
    """Write a file and ``.<its name>.checksums.json`` beside it; at every moment in between, the two fit."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    new, old = [sha256(temporary)], [sha256(path)] if path.exists() else []
    for digests, file in ((new + old, temporary), (new, None)):
        sums = _beside(path)
        sums.with_suffix(".tmp").write_text(json.dumps({path.name: digests}) + "\n", encoding="utf-8")
        _flush(sums.with_suffix(".tmp"))
        os.replace(sums.with_suffix(".tmp"), sums)
        if file:
            _flush(file)
            os.replace(file, path)


def write_atomically(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def check_with_sum(path: Path, remedy: str) -> None:
    """Raise DamagedFileError if ``path`` is not what ``replace_with_sum`` wrote; nothing happens without a sum."""
    _check(_beside(path), remedy)


def _flush(path: Path) -> None:
    """Onto the disk before the rename: a power cut must not leave an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{SUMS_FILE}")


def _check(sums_file: Path, remedy: str) -> None:
    if not sums_file.exists():
        return
    try:
        sums = json.loads(sums_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{sums_file} cannot be read ({error}): {remedy}") from error
    if not isinstance(sums, dict) or not all(isinstance(digests, list) for digests in sums.values()):
        raise DamagedFileError(f"{sums_file} holds no checksums: {remedy}")
    for name, digests in sums.items():
        path = sums_file.parent / name
        sound = "\0" not in name and ".." not in Path(name).parts and not Path(name).is_absolute()
        state = path.stat() if sound and path.is_file() else None
        if state is None or _digest_of(path.resolve(), state.st_size, state.st_mtime_ns) not in digests:
            raise DamagedFileError(f"{path} is missing, or not as {sums_file.name} says it was written: {remedy}")
