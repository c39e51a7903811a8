"""Where samples come from: arrays, folders of images, generators, or random numbers.

Every source is an iterable of batches that fit the model; iterating again starts anew. Only one
batch of preprocessed samples exists at a time.
"""

import csv
import importlib
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pwopt.errors import DataError, SpecError
from pwopt.model import Model
from pwopt.shapes import Input, bind, inputs

Array = npt.NDArray[Any]
Shapes = Mapping[str, Sequence[int]]

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@runtime_checkable
class CalibrationDataReader(Protocol):
    """What onnxruntime.quantization calls so: a feed at a time, None at the end."""

    def get_next(self) -> Mapping[str, Array] | None:
        """Return the next feed."""


Source = str | Path | CalibrationDataReader | Callable[[], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Batch:
    """One feed of the model.

    Attributes:
        feeds: An array for each input, of its type and shape.
        labels: int64 [samples], or None.
        samples: How many rows are samples. A model of fixed batch size gets a last batch filled
            up with repeated rows, which are not counted here.
    """

    feeds: dict[str, Array]
    labels: npt.NDArray[np.int64] | None
    samples: int


# -- preprocessing ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preprocess:
    """uint8 RGB → what a network was trained on: (x · scale − mean) / std for each channel.

    `mean` and `std` hold one value for all channels or one for each, in the order of `order`.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    order: Literal["rgb", "bgr"] = "rgb"

    @classmethod
    def parse(cls, text: str) -> "Preprocess":
        """Read a preset's name, or ``scale=1/255,mean=0.5:0.4:0.3,std=0.2,order=bgr``.

        Each key may be left out. Numbers may be fractions; a colon parts the channels.

        Raises:
            SpecError: an unknown preset, key or value.
        """
        if text in PRESETS:
            return PRESETS[text]
        options: dict[str, Any] = {}
        for part in text.split(","):
            key, separator, value = part.strip().partition("=")
            if not separator or key not in ("scale", "mean", "std", "order"):
                raise SpecError(f"--preprocess {text}: unknown; {CHOICES}")
            try:
                options[key] = _preprocess_value(key, value)
            except (ValueError, ZeroDivisionError):
                raise SpecError(f"--preprocess {text}: '{value}' is no {key}; {CHOICES}") from None
        return cls(**options)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Preprocess images [..., channels] in RGB or grayscale."""
        if self.order == "bgr":
            images = images[..., ::-1]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        result: npt.NDArray[np.float32] = (images * np.float32(self.scale) - mean) / std
        return result


def _preprocess_value(key: str, value: str) -> float | str | tuple[float, ...]:
    if key == "order":
        if value not in ("rgb", "bgr"):
            raise ValueError
        return value
    numbers = tuple(float(Fraction(number)) for number in value.split(":"))
    if (key == "scale" and len(numbers) != 1) or len(numbers) not in (1, 3):
        raise ValueError
    if key == "std" and 0.0 in numbers:
        raise ValueError
    return numbers[0] if key == "scale" else numbers


PRESETS = {
    "raw": Preprocess(),
    "unit": Preprocess(scale=1 / 255),
    # torchvision's ImageNet weights
    "imagenet": Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # Caffe's ImageNet weights, as Keras and MXNet still ship them
    "caffe": Preprocess(mean=(103.939, 116.779, 123.68), order="bgr"),
}

CHOICES = (
    "choose raw (0..255), unit (÷ 255), imagenet (torchvision), caffe (BGR minus mean) "
    "or scale=1/255,mean=R:G:B,std=R:G:B,order=rgb"
)


_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Gray from RGB (ITU-R BT.601), as Pillow does it."""


@dataclass(frozen=True, slots=True)
class _ImageInput:
    """An input that takes images: [N, C, H, W] or [N, H, W, C] with 1 or 3 channels."""

    name: str
    dtype: np.dtype[Any]
    channels: int
    channels_last: bool
    size: tuple[int | None, int | None]
    preprocess: Preprocess

    @property
    def expects(self) -> str:
        """The shape of 8-bit images that fit."""
        height, width = self.size
        return f"[N, {height or 'H'}, {width or 'W'}, 3 or 1]"

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether 8-bit images of this shape fit; grayscale may leave out the last axis."""
        sides = ("N", *self.size)
        return _fits(shape, sides) or any(_fits(shape, (*sides, c)) for c in (1, 3))

    def feed(self, images: npt.NDArray[np.uint8]) -> Array:
        """Turn uint8 [n, H, W(, 1 | 3)] into the input's layout, channels and type."""
        pixels = images if images.ndim == 4 else images[..., None]
        if pixels.shape[3] < self.channels:
            pixels = pixels.repeat(self.channels, axis=3)
        elif pixels.shape[3] > self.channels:
            luma = pixels @ _LUMA
            pixels = luma.round().astype(np.uint8)[..., None]
        values: Array = pixels
        if self.dtype != np.uint8:
            values = self.preprocess(pixels)
        if not self.channels_last:
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values, dtype=self.dtype)


def _image_input(declared: Input, preprocess: str | None, source: str) -> _ImageInput | None:
    """How an input takes images, or None for an input that does not.

    Raises:
        SpecError: no preprocessing was named, or one that does not go with the input.
    """
    shape = declared.shape
    if len(shape) != 4 or not (shape[1] in (1, 3) or shape[3] in (1, 3)):
        return None
    channels_last = shape[1] not in (1, 3)
    channels = shape[3] if channels_last else shape[1]
    assert isinstance(channels, int)
    if declared.dtype.kind != "f":
        if preprocess not in (None, "raw"):
            raise SpecError(f"--preprocess {preprocess}: input '{declared.name}' takes raw pixels")
        preprocess = "raw"
    if preprocess is None:
        raise SpecError(f"{source}: holds 8-bit images; add --preprocess: {CHOICES}")
    parsed = Preprocess.parse(preprocess)
    if max(len(parsed.mean), len(parsed.std)) > channels:
        raise SpecError(
            f"--preprocess {preprocess}: has three channels, input '{declared.name}' one"
        )
    height, width = shape[1:3] if channels_last else shape[2:4]
    size = tuple(side if isinstance(side, int) else None for side in (height, width))
    return _ImageInput(
        declared.name, declared.dtype, channels, channels_last, (size[0], size[1]), parsed
    )


# -- sources ----------------------------------------------------------------------------------


class Samples(ABC):
    """A source of batches for one model. Iterating again starts anew.

    Attributes:
        name: What messages call the source.
        count: Samples in it, None where only iterating tells.
        assumed: What was assumed for the axes that the model leaves open, empty if nothing.
    """

    def __init__(self, name: str, model: Model, count: int | None = None) -> None:
        self.name = name
        self.count = count
        self.assumed = ""
        self._inputs = inputs(model)
        self._batched = _batched(self._inputs)
        self._fixed_batch = fixed_batch(model)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches that fit the model.

        Raises:
            DataError: a sample that does not: wrong names, shape or type, NaN or infinity.
        """
        empty = True
        for feeds, labels in self._feeds():
            yield self._fit(feeds, labels)
            empty = False
        if empty:
            raise DataError(f"{self.name}: has no samples")

    def resize(self, feeds: Mapping[str, Array], size: int) -> dict[str, Array]:
        """Make a feed of `size` rows out of another: its first ones, repeated where too few."""
        return {
            name: array[np.arange(size) % len(array)] if name in self._batched else array
            for name, array in feeds.items()
        }

    def rows(self, feeds: Mapping[str, Array]) -> int:
        """Count the rows of a feed; 1 if no input has a batch axis."""
        return next((len(feeds[name]) for name in self._batched), 1)

    @abstractmethod
    def _feeds(self) -> Iterator[tuple[Mapping[str, Array], Array | None]]:
        """Yield feeds as they come, with labels or without."""

    def _fit(self, feeds: Mapping[str, Array], labels: Array | None) -> Batch:
        declared = {i.name for i in self._inputs}
        if feeds.keys() != declared:
            raise DataError(
                f"{self.name}: gives {_names(feeds)}, but the model takes {_names(declared)}"
            )
        fitted = {i.name: self._fit_one(feeds[i.name], i) for i in self._inputs}
        rows = self._count_rows(fitted)
        size = self._fixed_batch or rows
        if rows > size:
            raise DataError(f"{self.name}: gives {rows} samples at once; the model takes {size}")
        if rows < size:
            fitted = self.resize(fitted, size)
        if labels is not None:
            labels = _integers(labels, self.name)
            if len(labels) != rows:
                raise DataError(f"{self.name}: {len(labels)} labels for {rows} samples")
        return Batch(fitted, labels, rows)

    def _fit_one(self, value: Array, declared: Input) -> Array:
        array = _cast(value, declared, self.name)
        self._check_shape(array.shape, declared)
        return array

    def _check_shape(self, shape: tuple[int, ...], declared: Input) -> None:
        """Check all axes but the one that counts samples."""
        expected = declared.shape
        if declared.name in self._batched:
            expected = ("N", *expected[1:])
        if not _fits(shape, expected):
            raise _misfit(self.name, declared.name, shape, _shape(expected))

    def _count_rows(self, arrays: Mapping[str, Array]) -> int:
        counts = {name: len(arrays[name]) for name in self._batched}
        if len(set(counts.values())) > 1:
            text = ", ".join(f"{count} of '{name}'" for name, count in counts.items())
            raise DataError(f"{self.name}: samples differ in number: {text}")
        rows = next(iter(counts.values()), 1)
        if rows == 0:
            raise DataError(f"{self.name}: has no samples")
        return rows


class RandomData(Samples):
    """Seeded random inputs: enough to compare numbers, no measure of accuracy.

    Floating point is drawn from a normal distribution, 8-bit integers from 0..127 (pixels), wider
    ones from 0 and 1 (indices and lengths that any model can take), booleans evenly.
    """

    def __init__(
        self, model: Model, shapes: Shapes | None, *, batch: int, batches: int, seed: int
    ) -> None:
        super().__init__("random inputs", model)
        binding = bind(model, shapes, batch=batch)
        self.assumed = binding.describe()
        self._shapes = binding.shapes
        self.count = batches * next((self._shapes[name][0] for name in self._batched), 1)
        self._batches = batches
        self._seed = seed
        for i in self._inputs:
            if i.dtype.kind not in "fiub":
                raise DataError(
                    f"{model.name}: input '{i.name}' is of type {i.dtype}, for which no random "
                    "values make sense; give samples with --data"
                )

    def _feeds(self) -> Iterator[tuple[Mapping[str, Array], Array | None]]:
        rng = np.random.default_rng(self._seed)
        for _ in range(self._batches):
            yield {i.name: _random(rng, i.dtype, self._shapes[i.name]) for i in self._inputs}, None


def random_data(
    model: Model,
    shapes: Shapes | None = None,
    *,
    batch: int = 1,
    batches: int = 4,
    seed: int = 0,
) -> RandomData:
    """Draw `batches` feeds for every input of `model`, its open axes bound by `shapes`.

    Raises:
        SpecError: `shapes` does not fit the model.
        DataError: an input whose type cannot be drawn (strings).
    """
    return RandomData(model, shapes, batch=batch, batches=batches, seed=seed)


def _random(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return rng.integers(128 if dtype.itemsize == 1 else 2, size=shape).astype(dtype)


class ArrayData(Samples):
    """Arrays of an `.npz` file: named like the inputs, or `images`; optional `labels`."""

    def __init__(self, path: Path, model: Model, *, preprocess: str | None, batch: int) -> None:
        super().__init__(str(path), model)
        arrays = _read_npz(path)
        declared = {i.name: i for i in self._inputs}
        if "images" in arrays and "images" not in declared and len(declared) == 1:
            arrays = {next(iter(declared)): arrays["images"]} | arrays
        if missing := declared.keys() - arrays.keys():
            raise DataError(
                f"{path}: holds {_names(arrays)}, but not {_names(missing)}; name the arrays like "
                "the model's inputs, or 'images' for its only one"
            )
        self._arrays = {name: arrays[name] for name in declared}
        self._labels = arrays.get("labels") if "labels" not in declared else None
        self._batch = self._fixed_batch or batch
        self._images = {
            name: image
            for name, array in self._arrays.items()
            if (image := self._image(declared[name], array, preprocess)) is not None
        }
        if preprocess not in (None, "raw") and not self._images:
            raise SpecError(
                f"--preprocess {preprocess}: {path} holds no 8-bit images; other arrays are fed as "
                "they are"
            )
        self.count = self._check()

    def _image(self, declared: Input, array: Array, preprocess: str | None) -> _ImageInput | None:
        """How an array of 8-bit images is fed, None for an array that is fed as it is."""
        if array.dtype != np.uint8 or (
            declared.dtype == np.uint8 and _fits(array.shape[1:], declared.shape[1:])
        ):
            return None
        image = _image_input(declared, preprocess, self.name)
        if image is not None and not image.takes(array.shape):
            raise _misfit(self.name, declared.name, array.shape, f"8-bit images {image.expects}")
        return image

    def _check(self) -> int:
        """Check all that can be seen without preprocessing; return how many samples there are."""
        for i in self._inputs:
            if i.name not in self._images:
                self._check_shape(self._arrays[i.name].shape, i)
        rows = self._count_rows(self._arrays)
        if self._labels is not None:
            self._labels = _integers(self._labels, self.name)
            if len(self._labels) != rows:
                raise DataError(f"{self.name}: {len(self._labels)} labels for {rows} samples")
        return rows

    def _feeds(self) -> Iterator[tuple[Mapping[str, Array], Array | None]]:
        assert self.count is not None
        for start in range(0, self.count, self._batch):
            rows = slice(start, start + self._batch)
            feeds = {
                name: array[rows] if name in self._batched else array
                for name, array in self._arrays.items()
            }
            feeds |= {name: image.feed(feeds[name]) for name, image in self._images.items()}
            yield feeds, None if self._labels is None else self._labels[rows]


class ImageFolder(Samples):
    """A folder of images; labels from `labels.csv` or from the class folders they lie in.

    `labels.csv` has a head line with the columns file and label, and lists the images to read.
    Class folders are numbered by their sorted names, or by the number that is their name if all are
    numbers. An image of another size than the model's is resized (bilinear) until its shorter
    side fits, then cropped at the centre.
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        *,
        preprocess: str | None,
        batch: int,
        shapes: Shapes | None,
    ) -> None:
        super().__init__(str(path), model)
        _pillow()
        image = None
        if len(self._inputs) == 1:
            image = _image_input(self._inputs[0], preprocess, self.name)
        if image is None:
            raise DataError(
                f"{path}: is a folder of images, but the model does not take just images "
                f"({_names(i.name for i in self._inputs)}); give an .npz or module:callable"
            )
        self._image = image
        bound = bind(model, shapes, batch=batch).shapes[image.name]
        self._size = (bound[1], bound[2]) if image.channels_last else (bound[2], bound[3])
        if None in image.size:
            self.assumed = f"{self._size[0]}×{self._size[1]} pixels"
        self._batch = self._fixed_batch or batch
        self._files = _labelled_files(path)
        self.count = len(self._files)

    def _feeds(self) -> Iterator[tuple[Mapping[str, Array], Array | None]]:
        for start in range(0, len(self._files), self._batch):
            files = self._files[start : start + self._batch]
            pixels = np.stack([_read_image(f, self._size, self._image.channels) for f, _ in files])
            labels = [label for _, label in files if label is not None]
            feeds = {self._image.name: self._image.feed(pixels)}
            yield feeds, np.array(labels) if labels else None


class GeneratedData(Samples):
    """Feeds that a callable yields, batched as it likes: a dict, or (dict, labels)."""

    def __init__(self, name: str, call: Callable[[], Iterable[Any]], model: Model) -> None:
        super().__init__(name, model)
        self._call = call

    def _feeds(self) -> Iterator[tuple[Mapping[str, Array], Array | None]]:
        for item in _guarded(self._call, self.name):
            feeds, labels = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
            if not isinstance(feeds, Mapping):
                raise DataError(
                    f"{self.name}: yields {type(item).__name__}; it must yield a dict of arrays "
                    "named like the model's inputs, or (dict, labels)"
                )
            yield feeds, None if labels is None else np.asarray(labels)


def open_data(
    source: Source,
    model: Model,
    *,
    preprocess: str | None = None,
    batch: int = 32,
    shapes: Shapes | None = None,
) -> Samples:
    """Open samples for `model`.

    Args:
        source: An `.npz` file, a folder of images, ``package.module:callable``, a callable, or an
            onnxruntime CalibrationDataReader.
        model: Whose inputs the samples must fit.
        preprocess: For 8-bit images: a preset or a formula, see `Preprocess.parse`.
        batch: Samples in a batch, unless the model or the source fixes it.
        shapes: What the open axes of inputs are, where images must be cut to a size.

    Raises:
        DataError: no such source, or samples that do not fit the model.
        SpecError: preprocessing that is unknown, missing or out of place.
    """
    if isinstance(source, CalibrationDataReader):
        return GeneratedData(type(source).__name__, _read_all(source), model)
    if not isinstance(source, str | Path):
        return GeneratedData(getattr(source, "__name__", "data"), source, model)
    path = Path(source)
    if path.is_dir():
        return ImageFolder(path, model, preprocess=preprocess, batch=batch, shapes=shapes)
    if path.is_file():
        return ArrayData(path, model, preprocess=preprocess, batch=batch)
    module, separator, attribute = str(source).partition(":")
    if separator and all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        return GeneratedData(str(source), _import(module, attribute), model)
    raise DataError(f"{source}: no such file or folder; give an .npz, a folder or module:callable")


def fixed_batch(model: Model) -> int | None:
    """The batch size that the model demands, None if any will do."""
    declared = inputs(model)
    sizes = {i.name: i.shape[0] for i in declared if i.shape}
    first = next((sizes[name] for name in _batched(declared)), None)
    return first if isinstance(first, int) else None


def _batched(declared: Sequence[Input]) -> list[str]:
    """Inputs whose first axis counts samples: the open ones, else those as long as the first."""
    ranked = [i for i in declared if i.shape]
    opened = [i.name for i in ranked if not isinstance(i.shape[0], int)]
    return opened or [i.name for i in ranked if i.shape[0] == ranked[0].shape[0]]


# -- reading ----------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, Array]:
    hint = "save them with numpy.savez"
    try:
        # Opened here, because numpy leaves a file open that turns out to be no archive.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.lib.npyio.NpzFile):
                return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: is not a whole .npz file of plain arrays (pickled objects are not read); "
            f"{hint}"
        ) from error
    raise DataError(f"{path}: holds one array without a name; {hint}")


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise DataError(
            "reading images needs Pillow, which is not installed: pip install 'pwopt[images]'"
        ) from None


def _read_image(path: Path, size: tuple[int, int], channels: int) -> npt.NDArray[np.uint8]:
    """Decode to uint8 [height, width, channels], resized and cropped to `size` if need be."""
    pillow = _pillow()
    height, width = size
    try:
        with pillow.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image; remove or replace it") from error
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
        image = image.resize(resized, pillow.Resampling.BILINEAR)
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)


def _labelled_files(folder: Path) -> list[tuple[Path, int | None]]:
    table = folder / "labels.csv"
    files: list[tuple[Path, int | None]]
    if table.is_file():
        files = [*_read_labels(table)]
    elif images := _images_in(folder):
        files = [(file, None) for file in images]
    else:
        classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and _images_in(f))
        numbers = {
            name: int(name) if all(c.isdecimal() for c in classes) else index
            for index, name in enumerate(classes)
        }
        files = [(f, numbers[name]) for name in classes for f in _images_in(folder / name)]
    if not files:
        raise DataError(f"{folder}: has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _read_labels(table: Path) -> Iterator[tuple[Path, int]]:
    try:
        rows = list(csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: is not a text file of columns file,label") from error
    for line, row in enumerate(rows, start=2):
        name, label = row.get("file"), (row.get("label") or "").strip()
        if not name or not label.isdecimal():
            raise DataError(
                f"{table}, line {line}: wants the columns file,label with a class number from 0"
            )
        if not (table.parent / name).is_file():
            raise DataError(f"{table}, line {line}: there is no image '{name}'")
        yield table.parent / name, int(label)


def _import(module: str, attribute: str) -> Callable[[], Iterable[Any]]:
    name = f"{module}:{attribute}"
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the user's own code may raise anything
        raise DataError(f"{name}: cannot be imported ({_describe(error)})") from error
    if not callable(found):
        raise DataError(f"{name}: cannot be called; it must return an iterable of feeds")
    result: Callable[[], Iterable[Any]] = found
    return result


def _guarded(call: Callable[[], Iterable[Any]], name: str) -> Iterator[Any]:
    """What `call` yields; its exceptions become one line."""
    try:
        items = iter(call())
    except Exception as error:
        raise DataError(f"{name}: failed ({_describe(error)})") from error
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{name}: failed ({_describe(error)})") from error
        yield item


def _read_all(reader: CalibrationDataReader) -> Callable[[], Iterator[Mapping[str, Array]]]:
    """Read a reader to its end, from its start again if it can rewind."""
    started = False

    def feeds() -> Iterator[Mapping[str, Array]]:
        nonlocal started
        if started:
            rewind = getattr(reader, "rewind", None)
            if rewind is None:
                raise DataError(
                    f"{type(reader).__name__}: is read to its end and has no rewind(); add one"
                )
            rewind()
        started = True
        while (feed := reader.get_next()) is not None:
            yield feed

    return feeds


# -- checking ---------------------------------------------------------------------------------


def _cast(value: Array, declared: Input, source: str) -> Array:
    """The array in the input's type, if that loses no more than precision.

    Raises:
        DataError: another kind of numbers, NaN or infinity.
    """
    array = np.asarray(value)
    if not np.can_cast(array.dtype, declared.dtype, "same_kind"):
        raise DataError(
            f"{source}: '{declared.name}' is {array.dtype}, but the model takes {declared.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{source}: '{declared.name}' holds NaN or infinity; clean the samples")
    return np.asarray(array, dtype=declared.dtype, order="C")


def _fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    """Whether a shape is as declared; open axes take any size."""
    return len(shape) == len(expected) and all(
        size == want or not isinstance(want, int)
        for size, want in zip(shape, expected, strict=True)
    )


def _misfit(source: str, name: str, shape: Sequence[int], expected: str) -> DataError:
    return DataError(
        f"{source}: '{name}' has shape {_shape(shape)}, but the model takes {expected}"
    )


def _integers(labels: Array, source: str) -> npt.NDArray[np.int64]:
    """Class numbers as int64 [samples].

    Raises:
        DataError: not integers, or not one for each sample.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim == 0 or labels.size != len(labels):
        raise DataError(
            f"{source}: labels are {labels.dtype} {list(labels.shape)}; wanted are integers, one "
            "class number for each sample"
        )
    return labels.reshape(-1).astype(np.int64)


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "nothing"


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
