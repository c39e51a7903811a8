"""What may watch a pipeline: timing, a dump after each pass, a check after each pass."""

import time
from pathlib import Path

from pwopt.model import Model
from pwopt.rewriting import Observer, Pass, PassReport


class Timing(Observer):
    """Keeps the seconds that each pass took, in order, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._start = 0.0

    def before(self, step: Pass, model: Model) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after(self, step: Pass, model: Model, report: PassReport) -> None:
        """Note the time."""
        self.seconds.append((step.name, time.perf_counter() - self._start))


class Dump(Observer):
    """Saves the model after each pass as ``NN-pass.onnx`` in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._count = 0

    def after(self, step: Pass, model: Model, report: PassReport) -> None:
        """Save the model."""
        self._count += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        model.save(self.folder / f"{self._count:02}-{step.name}.onnx")


class Verify(Observer):
    """Checks after each pass that the graph is a valid model, so that a fault names its pass."""

    def after(self, step: Pass, model: Model, report: PassReport) -> None:
        """Raise ModelError if what the pass made is not valid."""
        if report.rewrote:
            model.check(f"after pass '{step.name}'")
