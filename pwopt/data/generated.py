"""Samples that the user's own code makes: a callable, ``module:callable``, or a reader."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pwopt.data.samples import Feeds, Samples
from pwopt.errors import DataError, SpecError
from pwopt.model import Model
from pwopt.shapes import inputs


@runtime_checkable
class CalibrationDataReader(Protocol):
    """What onnxruntime.quantization calls so: a feed at a time, None at the end."""

    def get_next(self) -> Feeds | None:
        """Return the next feed."""


def generated_samples(
    name: str, call: Callable[[], Iterable[Any]], model: Model, *, preprocess: str | None
) -> Samples:
    """Take feeds from a callable, batched as it likes: each a dict, or (dict, labels).

    Whatever the callable raises becomes a DataError while samples are drawn.

    Raises:
        SpecError: preprocessing, of which feeds are in no need.
    """
    if preprocess not in (None, "raw"):
        raise SpecError(f"--preprocess {preprocess}: what {name} gives is fed as it is")

    def draw() -> Iterator[tuple[Feeds, Any]]:
        try:
            for item in call():
                yield _feeds_and_labels(item, name)
        except DataError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise DataError(f"{name}: failed ({_describe(error)})") from error

    return Samples(name, inputs(model), draw)


def reader_samples(
    reader: CalibrationDataReader, model: Model, *, preprocess: str | None
) -> Samples:
    """Read a reader to its end, the next time from its start again if it can rewind."""
    name = type(reader).__name__
    started = False

    def feeds() -> Iterator[Feeds]:
        nonlocal started
        if started:
            rewind = getattr(reader, "rewind", None)
            if rewind is None:
                raise DataError(f"{name}: is read to its end and has no rewind(); add one")
            rewind()
        started = True
        while (feed := reader.get_next()) is not None:
            yield feed

    return generated_samples(name, feeds, model, preprocess=preprocess)


def import_callable(module: str, attribute: str) -> Callable[[], Iterable[Any]]:
    """Import ``module:attribute``, from the working directory too.

    Raises:
        DataError: it cannot be imported, or is no callable.
    """
    name = f"{module}:{attribute}"
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise DataError(f"{name}: cannot be imported ({_describe(error)})") from error
    if not callable(found):
        raise DataError(f"{name}: cannot be called; it must return an iterable of feeds")
    result: Callable[[], Iterable[Any]] = found
    return result


def _feeds_and_labels(item: Any, name: str) -> tuple[Feeds, Any]:
    feeds, labels = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(feeds, Mapping):
        raise DataError(
            f"{name}: yields {type(item).__name__}; it must yield a dict of arrays "
            "named like the model's inputs, or (dict, labels)"
        )
    return feeds, labels


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
