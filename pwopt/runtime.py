"""onnxruntime: sessions, and the latencies of several measured in turn."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pwopt.errors import ModelError
from pwopt.model import Model

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

LARGE = 1 << 28
"""Bytes of a model that a session is given, and keeps; a larger one is loaded from a file."""

RESAMPLES = 2000
"""Bootstrap samples behind the interval of a speed-up."""

WARM_UP_RUNS = 3
"""Runs that come first and are not timed."""


def cores() -> int:
    """Count the cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def session(
    model: Model | str | Path, *, threads: int = 1, profile: Path | None = None
) -> ort.InferenceSession:
    """Open a CPU session with every graph optimisation.

    Args:
        model: A Model with its edits, or a file. Weights may be external, and exceed 2 GB.
        threads: Threads within one operator; operators run one after the other.
        profile: Profile all runs; what the file's path starts with.

    Raises:
        ModelError: onnxruntime cannot load it; the message is the first line of its own.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # Idle threads of one session would otherwise spin on the cores that the next one runs on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if not isinstance(model, Model):
        return _load(str(model), options, str(model))
    data = model.serialized()
    if data is not None and len(data) <= LARGE:
        if model.folder:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", model.folder
            )
        return _load(data, options, model.name)
    del data
    with tempfile.TemporaryDirectory(prefix="pwopt-") as folder:
        path = Path(folder) / "model.onnx"
        model.write(path)
        return _load(str(path), options, model.name)


def _load(source: str | bytes, options: ort.SessionOptions, name: str) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ModelError(f"{name}: onnxruntime cannot load it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__


def run(session: ort.InferenceSession, feeds: Feeds, *, name: str) -> dict[str, Array]:
    """Return all outputs for one feed, by name.

    Raises:
        ModelError: onnxruntime failed, or an output is not a tensor of numbers; the message
            starts with `name`.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ModelError(f"{name}: onnxruntime cannot run it: {_first_line(error)}") from error
    for output, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise ModelError(f"{name}: output '{output}' is not a tensor of numbers")
    return dict(zip(names, values, strict=True))


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster one session ran than another: ratio of medians, 95 % interval."""

    ratio: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Timing:
    """Latencies of several sessions, measured in turn. `samples_ms` is (rounds, sessions)."""

    samples_ms: npt.NDArray[np.float64]

    @property
    def median_ms(self) -> tuple[float, ...]:
        """Median milliseconds of each session."""
        return tuple(float(median) for median in np.median(self.samples_ms, axis=0))

    def speedup(self, base: int, other: int, *, seed: int = 0) -> Speedup:
        """Tell how many times faster session `other` is than session `base`.

        The interval is a percentile bootstrap over rounds: both latencies of a round are drawn
        together, so that a disturbance that hit both counts once (Efron & Tibshirani 1993).
        """
        pair = self.samples_ms[:, [base, other]]
        rounds = np.random.default_rng(seed).integers(len(pair), size=(RESAMPLES, len(pair)))
        medians = np.median(pair[rounds], axis=1)
        low, high = np.percentile(medians[:, 0] / medians[:, 1], [2.5, 97.5])
        before, after = np.median(pair, axis=0)
        return Speedup(float(before / after), (float(low), float(high)))


def interleave(
    sessions: Sequence[ort.InferenceSession],
    feeds: Feeds,
    *,
    seconds: float = 5.0,
    min_rounds: int = 7,
    max_rounds: int = 1000,
) -> Timing:
    """Time sessions in turn, run by run, so that what disturbs the machine hits all alike.

    Every other round goes backwards, so that no session always runs after the same neighbour.
    A few runs of each come first and are not counted. Sessions of one thread, which is then the
    calling one, are timed by the processor time that they take: the same on an idle machine, and
    on a busy one without the time for which others had the core.

    Args:
        sessions: What to time, all on the same feeds.
        feeds: One array for each input.
        seconds: Start rounds for so long,
        min_rounds: but do as many as this however slow they are,
        max_rounds: and as many as this at most.
    """
    feeds = dict(feeds)
    single = all(s.get_session_options().intra_op_num_threads == 1 for s in sessions)
    clock = time.thread_time if single else time.perf_counter
    for timed in [*sessions] * WARM_UP_RUNS:
        timed.run(None, feeds)
    samples: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(samples) < min_rounds or (len(samples) < max_rounds and time.perf_counter() < end):
        order = list(range(len(sessions)))[:: -1 if len(samples) % 2 else 1]
        row = [0.0] * len(sessions)
        for index in order:
            begin = clock()
            sessions[index].run(None, feeds)
            row[index] = (clock() - begin) * 1e3
        samples.append(row)
    return Timing(np.array(samples))
