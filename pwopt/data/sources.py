"""Any source of samples by what it is: a file, a folder, a callable, a reader."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pwopt.data.arrays import array_samples
from pwopt.data.folder import folder_samples
from pwopt.data.generated import (
    CalibrationDataReader,
    generated_samples,
    import_callable,
    reader_samples,
)
from pwopt.data.samples import Samples
from pwopt.errors import DataError
from pwopt.model import Model
from pwopt.shapes import InputShapes

Source = str | Path | CalibrationDataReader | Callable[[], Iterable[Any]]


def open_data(
    source: Source,
    model: Model,
    *,
    preprocess: str | None = None,
    batch: int = 32,
    shapes: InputShapes | None = None,
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
        return reader_samples(source, model, preprocess=preprocess)
    if not isinstance(source, str | Path):
        name = getattr(source, "__name__", "data")
        return generated_samples(name, source, model, preprocess=preprocess)
    path = Path(source)
    if path.is_dir():
        return folder_samples(path, model, preprocess=preprocess, batch=batch, shapes=shapes)
    if path.is_file():
        return array_samples(path, model, preprocess=preprocess, batch=batch)
    module, separator, attribute = str(source).partition(":")
    if separator and all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        call = import_callable(module, attribute)
        return generated_samples(str(source), call, model, preprocess=preprocess)
    raise DataError(f"{source}: no such file or folder; give an .npz, a folder or module:callable")
