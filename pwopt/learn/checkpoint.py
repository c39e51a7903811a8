"""What is needed to go on after a kill: one file, whole or not at all."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from torch import Tensor

from pwopt.errors import LearnError
from pwopt.files import atomic_write

FORMAT = 2

_BROKEN = (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError, ValueError)
"""What torch raises for files that are cut short or are something else."""

State = dict[str, Any]
"""Tensors, numbers, texts, and lists and dictionaries of them."""


class Checkpoint:
    """The state of each stage of a run, by the stage's name, in memory and in a file.

    Attributes:
        path: The file.
        key: Which run it is of, see `fingerprint`.
        stages: The state of each stage that was begun.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self.stages: dict[str, State] = {}

    @classmethod
    def resume(cls, path: Path, key: str) -> Self:
        """Read what an earlier run wrote; with no file there, begin anew.

        Raises:
            LearnError: the file is broken, or of another run.
        """
        checkpoint = cls(path, key)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return checkpoint
        except OSError as error:
            raise LearnError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            with file:
                content = torch.load(file, map_location="cpu", weights_only=True)
            written, checkpoint.stages = content["key"], content["stages"]
            if content["format"] != FORMAT:
                raise ValueError
        except _BROKEN:
            raise LearnError(
                f"{path}: is broken, or no checkpoint of this version; delete it to begin anew"
            ) from None
        if written != key:
            raise LearnError(
                f"{path}: is of another run (other models, data or options); give those again, or "
                "delete it to begin anew"
            )
        return checkpoint

    def save(self, stage: str, state: State) -> None:
        """Write this stage's state, beside those of others.

        Raises:
            PwoptError: it cannot be written; what was there before stays.
        """
        self.stages[stage] = state
        content = {"format": FORMAT, "key": self.key, "stages": self.stages}
        with atomic_write(self.path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's own writer, instead of an OSError
                reason = str(error).partition("\n")[0]
                raise LearnError(
                    f"{self.path}: cannot be written ({reason}); choose another place"
                ) from error


def fingerprint(*parts: Mapping[str, Tensor] | bytes | str) -> str:
    """Return a hash of all that a run depends on: weights, graphs, data and options."""
    digest = hashlib.sha256()
    for part in parts:
        for piece in _pieces(part):
            digest.update(f"{len(piece)}:".encode())
            digest.update(piece)
    return digest.hexdigest()


def _pieces(part: Mapping[str, Tensor] | bytes | str) -> list[Any]:
    if isinstance(part, bytes):
        return [part]
    if isinstance(part, str):
        return [part.encode()]
    return [
        piece
        for name, tensor in part.items()
        for piece in (
            f"{name} {tensor.dtype} {list(tensor.shape)}".encode(),
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data,
        )
    ]
