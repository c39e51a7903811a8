"""Samples from an `.npz` file: arrays named like the inputs, or `images`; optional `labels`."""

import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pwopt.data.images import ImageInput, image_input
from pwopt.data.samples import (
    Array,
    Feeds,
    Samples,
    batched,
    check_shape,
    class_numbers,
    count_rows,
    fits,
    fixed_batch,
    in_turn,
    misfit,
    quoted,
)
from pwopt.errors import DataError, SpecError
from pwopt.model import Model
from pwopt.shapes import Input, inputs

IN_MEMORY = 256 << 20
"""Bytes up to which an array is held in memory; a larger one is unpacked into a temporary file."""


def array_samples(path: Path, model: Model, *, preprocess: str | None, batch: int) -> Samples:
    """Open an `.npz` file for `model`, and check all that can be seen without preprocessing.

    Arguments and errors are those of `open_data`.
    """
    name, declared = str(path), inputs(model)
    stored = _read_npz(path)
    arrays = _by_input(stored, declared, name)
    images: dict[str, ImageInput] = {}
    for i in declared:
        if image := _image(arrays[i.name], i, preprocess, name):
            images[i.name] = image
        else:
            check_shape(arrays[i.name].shape, i, declared, name)
    if preprocess not in (None, "raw") and not images:
        raise SpecError(
            f"--preprocess {preprocess}: {name} holds no 8-bit images; other arrays are fed as "
            "they are"
        )
    count = count_rows(arrays, declared, name)
    labels = stored.get("labels") if "labels" not in arrays else None
    if labels is not None:
        labels = class_numbers(labels, count, name)
    counted, size = batched(declared), fixed_batch(declared) or batch

    def take(numbers: Sequence[int]) -> tuple[Feeds, Array | None]:
        rows = np.asarray(numbers)
        feeds = {key: a[rows] if key in counted else a for key, a in arrays.items()}
        feeds |= {key: image.feed(feeds[key]) for key, image in images.items()}
        return feeds, None if labels is None else labels[rows]

    return Samples(name, declared, in_turn(take, count, size), count, take=take)


def _by_input(stored: dict[str, Array], declared: Sequence[Input], source: str) -> dict[str, Array]:
    """Find the array for each input."""
    names = [i.name for i in declared]
    if len(names) == 1 and names[0] not in stored and "images" in stored:
        return {names[0]: stored["images"]}
    if missing := set(names) - stored.keys():
        raise DataError(
            f"{source}: holds {quoted(stored)}, but not {quoted(missing)}; name the arrays like "
            "the model's inputs, or 'images' for its only one"
        )
    return {name: stored[name] for name in names}


def _image(array: Array, declared: Input, preprocess: str | None, source: str) -> ImageInput | None:
    """Tell how an array of 8-bit images is fed; None for an array that is fed as it is."""
    if array.dtype != np.uint8:
        return None
    if declared.dtype == np.uint8 and fits(array.shape[1:], declared.shape[1:]):
        return None
    image = image_input(declared, preprocess, source)
    if image is not None and not image.takes(array.shape):
        raise misfit(source, declared.name, array.shape, f"8-bit images {image.expects}")
    return image


def _read_npz(path: Path) -> dict[str, Array]:
    hint = "save them with numpy.savez"
    try:
        # Opened here, because numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.lib.npyio.NpzFile):
                return {name: _member(file, name, path) for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: is not a whole .npz file of plain arrays (pickled objects are not read); "
            f"{hint}"
        ) from error
    raise DataError(f"{path}: holds one array without a name; {hint}")


def _member(file: Any, name: str, path: Path) -> Array:
    stored = f"{name}.npy"
    large = stored in file.zip.namelist() and file.zip.getinfo(stored).file_size > IN_MEMORY
    array = _unpacked(file.zip, stored, path) if large else file[name]
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of other files
        raise ValueError("not an array")
    return array


def _unpacked(archive: zipfile.ZipFile, stored: str, path: Path) -> Array:
    """Map an array into memory from a temporary file, which takes no room once it is not used."""
    try:
        # The system keeps a file that is mapped, although its name is gone: nothing is left behind
        # even if the process is killed.
        with tempfile.TemporaryDirectory(prefix="pwopt-", ignore_cleanup_errors=True) as folder:
            unpacked = Path(archive.extract(stored, folder))
            array: Array = np.load(unpacked, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        gigabytes = archive.getinfo(stored).file_size / 1e9
        raise DataError(
            f"{path}: '{stored}' cannot be unpacked for the time being "
            f"({error.strerror or error}); set TMPDIR to a folder with {gigabytes:.1f} GB to spare"
        ) from error
    return array
