"""Samples from a folder of images; labels from `labels.csv` or from the class folders they lie in.

`labels.csv` has a head line with the columns file and label, and lists the images to read. Class
folders are numbered by their sorted names, or by the number that is their name if all are numbers.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pwopt.data.images import image_input, pillow, read_image
from pwopt.data.samples import Feeds, Samples, fixed_batch, in_turn, quoted
from pwopt.errors import DataError
from pwopt.model import Model
from pwopt.shapes import InputShapes, bind, inputs

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

_DIGITS = 18  # so many always fit into int64


def folder_samples(
    path: Path,
    model: Model,
    *,
    preprocess: str | None,
    batch: int,
    shapes: InputShapes | None,
) -> Samples:
    """Open a folder for `model`, without reading an image. Arguments and errors as `open_data`."""
    pillow()  # or say at once that it is missing
    declared = inputs(model)
    image = image_input(declared[0], preprocess, str(path)) if len(declared) == 1 else None
    if image is None:
        raise DataError(
            f"{path}: is a folder of images, but the model does not take just images "
            f"({quoted(i.name for i in declared)}); give an .npz or module:callable"
        )
    _, *bound = bind(model, shapes, batch=batch).shapes[image.declared.name]
    height, width = bound[:2] if image.channels_last else bound[1:]
    fixed = all(isinstance(side, int) for side in image.size)
    files = _labelled_files(path)
    size = fixed_batch(declared) or batch

    def take(numbers: Sequence[int]) -> tuple[Feeds, list[int] | None]:
        names, labels = zip(*(files[number] for number in numbers), strict=True)
        pixels = np.stack([read_image(f, (height, width), image.channels) for f in names])
        return {image.declared.name: image.feed(pixels)}, None if None in labels else [*labels]

    count, assumed = len(files), "" if fixed else f"{height}×{width} pixels"
    return Samples(str(path), declared, in_turn(take, count, size), count, assumed, take)


def _labelled_files(folder: Path) -> list[tuple[Path, int | None]]:
    table = folder / "labels.csv"
    files: list[tuple[Path, int | None]]
    if table.is_file():
        files = [*_read_labels(table)]
    elif images := _images_in(folder):
        files = [(file, None) for file in images]
    else:
        files = [*_class_folders(folder)]
    if not files:
        raise DataError(f"{folder}: has no images ({', '.join(sorted(SUFFIXES))})")
    return files


def _read_labels(table: Path) -> Iterator[tuple[Path, int]]:
    try:
        reader = csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines())
        columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: is not a text file of columns file,label") from error
    if not {"file", "label"} <= set(columns):
        raise DataError(f"{table}, line 1: wants the columns file,label, parted by a comma")
    if not rows:
        raise DataError(f"{table}: lists no images below its columns")
    for line, row in enumerate(rows, start=2):
        name, label = row.get("file"), (row.get("label") or "").strip()
        if not name or not _is_class_number(label):
            raise DataError(
                f"{table}, line {line}: wants the columns file,label with a class number from 0, "
                f"of at most {_DIGITS} digits"
            )
        if not (table.parent / name).is_file():
            raise DataError(f"{table}, line {line}: there is no image '{name}'")
        yield table.parent / name, int(label)


def _class_folders(folder: Path) -> Iterator[tuple[Path, int]]:
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and _images_in(f))
    numbered = all(_is_class_number(name) for name in names)
    for index, name in enumerate(names):
        for file in _images_in(folder / name):
            yield file, int(name) if numbered else index


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())


def _is_class_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= _DIGITS
