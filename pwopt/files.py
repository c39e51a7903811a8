"""Files that are mapped to be read, and written whole or not at all."""

import contextlib
import mmap
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from pwopt.errors import PwoptError


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """View the bytes of a file without a copy of them; pipes and the like are read instead.

    The view ends with the block. The file must not be cut meanwhile.

    Raises:
        OSError: the file cannot be opened or read.
    """
    with path.open("rb") as file:
        try:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # a pipe or device; an empty file
            yield memoryview(file.read())
            return
        with mapping, memoryview(mapping) as view:
            yield view


class ScratchFolder(str):
    """The path of a temporary folder that exists as long as somebody refers to this very object."""

    __slots__ = ("__weakref__",)

    def __new__(cls) -> Self:
        """Make the folder."""
        folder = super().__new__(cls, tempfile.mkdtemp(prefix="pwopt-"))
        weakref.finalize(folder, shutil.rmtree, str(folder), ignore_errors=True)
        return folder


def check_plain(path: Path, called: Path) -> None:
    """Refuse to write where a folder is, or a device or pipe, which would be replaced.

    Raises:
        PwoptError: one is there; it speaks of `called`.
    """
    if path.is_dir():
        raise PwoptError(f"{called}: is a folder; name a file to write")
    if path.exists() and not path.is_file():
        raise PwoptError(f"{called}: is not a plain file; name another one to write")


@contextlib.contextmanager
def atomic_write(path: Path, *, called: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    The bytes reach the disk before the rename, so that a crash leaves the old file or the new
    one. After an exception the temporary file is gone and `path` is as it was. Errors speak of
    `called`, where that is what the user knows of.

    Raises:
        PwoptError: the folder is missing or cannot be written, or the disk is full.
    """
    called = called or path
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".pwopt.{secrets.token_hex(8)}")
    try:
        check_plain(target, called)
        with temporary.open("xb") as file:  # permissions as the umask says
            if target.exists():
                temporary.chmod(target.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise PwoptError(
            f"{called}: cannot be written ({error.strerror}); choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename last, where the file system lets us; the file itself is whole anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
