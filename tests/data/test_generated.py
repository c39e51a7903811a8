from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import NCHW, model, only

from pwopt.data import open_data
from pwopt.errors import DataError, SpecError


def test_module_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_samples.py").write_text(
        "import numpy as np\n"
        "class Feeds:\n"
        "    @staticmethod\n"
        "    def plain():\n"
        "        yield {'x': np.ones((2, 3), 'f')}\n"
        "def labelled():\n"
        "    yield {'x': np.ones((2, 3))}, [4, 5]\n"
        "def broken():\n"
        "    yield {'x': np.ones((2, 3))}\n"
        "    raise KeyError('lost')\n"
        "def wrong():\n"
        "    yield {'z': np.ones((2, 3))}\n"
        "def ends():\n"
        "    __import__('sys').exit(0)\n"
        "def ends_later():\n"
        "    yield {'x': np.ones((2, 3))}\n"
        "    raise SystemExit\n"
        "number = 3\n"
    )
    (tmp_path / "ends_at_import.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    small = model("float[N, 3] x")
    assert only(open_data("my_samples:Feeds.plain", small)).labels is None
    samples = open_data("my_samples:labelled", small)
    for _ in range(2):
        batch = only(samples)
        assert batch.labels is not None
        assert batch.labels.tolist() == [4, 5]
        assert batch.samples == 2
    for source, message in {
        "my_samples:broken": r"my_samples:broken: failed \(KeyError: 'lost'\)",
        "my_samples:ends": r"my_samples:ends: failed \(SystemExit: 0\)",
        "my_samples:ends_later": r"my_samples:ends_later: failed \(SystemExit",
        "ends_at_import:f": r"ends_at_import:f: cannot be imported \(SystemExit: 0\)",
        "my_samples:wrong": "gives 'z', but the model takes 'x'",
        "my_samples:nothing": r"cannot be imported \(AttributeError",
        "no_such_module:f": r"cannot be imported \(ModuleNotFoundError",
        "my_samples:number": "cannot be called",
    }.items():
        with pytest.raises(DataError, match=message):
            list(open_data(source, small))


def test_callable_that_yields_something_else() -> None:
    small = model("float[2, 3] x")
    for item, message in (
        (np.ones((2, 3)), "yields ndarray; it must yield a dict"),
        ({"x": np.ones(3)}, r"shape \[3\], but the model takes \[N, 3\]"),
        ({"x": np.ones((4, 3))}, "gives 4 samples at once; the model takes 2"),
        (({"x": np.ones((2, 3))}, [1]), "1 labels for 2 samples"),
        ({"x": [[1], [1, 2]]}, "'x' cannot be made an array of"),
        (({"x": np.ones((2, 3))}, [[1], [1, 2]]), "labels cannot be made an array of"),
        ({1: np.ones(1), "x": np.ones((2, 3))}, "gives '1', 'x', but the model takes 'x'"),
    ):
        with pytest.raises(DataError, match=message):
            list(open_data(lambda item=item: [item], small))
    with pytest.raises(DataError, match="has no samples"):
        list(open_data(list, small))


class Reader:
    """As onnxruntime.quantization.CalibrationDataReader has it."""

    def __init__(self) -> None:
        self.left = iter([np.ones((1, 3), np.float32)] * 2)

    def get_next(self) -> dict[str, np.ndarray] | None:
        x = next(self.left, None)
        return None if x is None else {"x": x}


class Rewindable(Reader):
    def rewind(self) -> None:
        self.__init__()  # type: ignore[misc]


def test_calibration_data_reader() -> None:
    small = model("float[N, 3] x")
    once = open_data(Reader(), small)
    assert once.name == "Reader"
    assert len(list(once)) == 2
    with pytest.raises(DataError, match=r"Reader: is read to its end and has no rewind"):
        list(once)
    again = open_data(Rewindable(), small)
    assert [len(list(again)), len(list(again))] == [2, 2]


@pytest.mark.parametrize("source", [Reader(), list, "builtins:list"])
def test_what_code_gives_is_not_preprocessed(source: Any) -> None:
    with pytest.raises(SpecError, match=r"--preprocess unit: what .*(Reader|list) gives"):
        open_data(source, NCHW, preprocess="unit")


@pytest.mark.parametrize("source", ["nowhere.npz", "no/where", "C:nowhere\\x.npz"])
def test_missing_source(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_data(source, NCHW)
