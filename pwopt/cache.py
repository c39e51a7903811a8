"""What was computed before, kept in the user's cache folder; everything works without it."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

from platformdirs import user_cache_path

from pwopt.errors import PwoptError
from pwopt.files import atomic_write

LIMIT = 1 << 30
"""Bytes that the files of one kind may take together; the longest unused are deleted beyond."""

T = TypeVar("T")


def cache_folder() -> Path:
    """Return where files are kept: `$PWOPT_CACHE`, or the platform's place for caches."""
    chosen = os.environ.get("PWOPT_CACHE")
    return Path(chosen) if chosen else user_cache_path("pwopt")


def load(name: str, read: Callable[[IO[bytes]], T]) -> T | None:
    """Return what `read` makes of a cached file; None where it is missing or `read` raises.

    Args:
        name: A path below the cache folder: the kind of content, and the key with a suffix.
        read: Reads the open file.
    """
    path = cache_folder() / name
    try:
        with path.open("rb") as file:
            value = read(file)
    except Exception:  # a file that was cut off, or is another version's, may raise anything
        return None
    with contextlib.suppress(OSError):
        path.touch()  # which counts as used
    return value


def store(name: str, write: Callable[[IO[bytes]], object]) -> None:
    """Cache what `write` writes, whole or not at all; do nothing where that is not possible."""
    path = cache_folder() / name
    with contextlib.suppress(OSError, PwoptError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            write(file)
        _trim(path.parent, path.suffix)


def _trim(folder: Path, suffix: str) -> None:
    """Delete the files of one kind that were not used for longest, until all fit the limit."""
    files = [(f.stat(), f) for f in folder.iterdir() if f.suffix == suffix]
    total = sum(status.st_size for status, _ in files)
    for status, file in sorted(files, key=lambda item: item[0].st_mtime_ns):
        if total <= LIMIT:
            return
        file.unlink()
        total -= status.st_size
