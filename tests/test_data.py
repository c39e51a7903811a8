import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser
from PIL import Image

from pwopt import data
from pwopt.data import Preprocess, open_data, random_data
from pwopt.errors import DataError, SpecError
from pwopt.model import Model

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(5, 6, 8, 3), dtype=np.uint8)
GRAY = RNG.integers(256, size=(5, 6, 8), dtype=np.uint8)


def model(inputs: str) -> Model:
    """A model with these inputs, of which it uses nothing."""
    return Model(
        parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]>
            g ({inputs}) => (float y) {{ y = Constant <value = float {{1.0}}> () }}"""
        )
    )


NCHW = model("float[N, 3, 6, 8] x")


def save(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "samples.npz"
    np.savez(path, **arrays)
    return path


def only(samples: data.Samples) -> data.Batch:
    (batch,) = samples
    return batch


# -- preprocessing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raw", (10, 20, 30)),
        ("unit", (10 / 255, 20 / 255, 30 / 255)),
        (
            "imagenet",
            ((10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225),
        ),
        ("caffe", (30 - 103.939, 20 - 116.779, 10 - 123.68)),
        ("scale=1/255", (10 / 255, 20 / 255, 30 / 255)),
        ("mean=1:2:3,std=2,order=bgr", (29 / 2, 18 / 2, 7 / 2)),
        ("scale=0.5, std=1:2:4", (5, 5, 3.75)),
    ],
)
def test_preprocess(text: str, expected: tuple[float, ...]) -> None:
    pixel = np.array([[[[10, 20, 30]]]], np.uint8)
    np.testing.assert_allclose(Preprocess.parse(text)(pixel)[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "text",
    ["", "imagnet", "scale", "scale=x", "scale=1:2:3", "mean=1:2", "std=0", "scale=1/0",
     "order=rbg", "unit,order=bgr", "gamma=2"],
)  # fmt: skip
def test_preprocess_that_is_wrong_names_the_choices(text: str) -> None:
    with pytest.raises(SpecError, match=r"unit .* imagenet"):
        Preprocess.parse(text)


# -- arrays -----------------------------------------------------------------------------------


def test_images_become_what_the_input_wants(tmp_path: Path) -> None:
    path = save(tmp_path, images=RGB, labels=np.arange(5, dtype=np.uint8))
    batch = only(open_data(path, NCHW, preprocess="unit"))
    np.testing.assert_allclose(batch.feeds["x"], RGB.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert batch.feeds["x"].dtype == np.float32
    assert batch.labels is not None
    assert batch.labels.dtype == np.int64
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]


def test_images_for_channels_last_of_open_size_in_half_precision(tmp_path: Path) -> None:
    x = only(
        open_data(save(tmp_path, images=RGB), model("float16[N, H, W, 3] x"), preprocess="raw")
    ).feeds["x"]
    assert x.dtype == np.float16
    np.testing.assert_array_equal(x, RGB)


def test_gray_images_for_a_colour_input_and_back(tmp_path: Path) -> None:
    for images in (GRAY, GRAY[..., None]):
        x = only(open_data(save(tmp_path, images=images), NCHW, preprocess="raw")).feeds["x"]
        np.testing.assert_array_equal(x, np.stack([GRAY] * 3, axis=1))
    gray = only(
        open_data(save(tmp_path, images=RGB), model("float[N, 1, 6, 8] x"), preprocess="raw")
    ).feeds["x"]
    pillow = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in RGB])
    np.testing.assert_allclose(gray[:, 0], pillow, atol=1)


def test_integer_input_takes_pixels_as_they_are(tmp_path: Path) -> None:
    x = only(open_data(save(tmp_path, images=RGB), model("uint8[N, 3, 6, 8] x"))).feeds["x"]
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, RGB.transpose(0, 3, 1, 2))
    again = only(open_data(save(tmp_path, x=x), model("uint8[N, 3, 6, 8] x"))).feeds["x"]
    np.testing.assert_array_equal(again, x)


def test_batches_have_the_size_asked_for_and_come_again(tmp_path: Path) -> None:
    samples = open_data(
        save(tmp_path, images=RGB, labels=np.arange(5)), NCHW, preprocess="raw", batch=2
    )
    assert samples.count == 5
    for _ in range(2):
        assert [len(b.feeds["x"]) for b in samples] == [2, 2, 1]
        labels = [b.labels.tolist() for b in samples if b.labels is not None]
        assert labels == [[0, 1], [2, 3], [4]]


def test_last_batch_of_a_fixed_size_is_filled_up(tmp_path: Path) -> None:
    fixed = model("float[2, 3, 6, 8] x")
    batches = list(
        open_data(save(tmp_path, images=RGB, labels=np.arange(5)), fixed, preprocess="raw")
    )
    assert [b.feeds["x"].shape[0] for b in batches] == [2, 2, 2]
    assert [b.samples for b in batches] == [2, 2, 1]
    np.testing.assert_array_equal(batches[2].feeds["x"][0], batches[2].feeds["x"][1])
    assert batches[2].labels is not None
    assert batches[2].labels.tolist() == [4]


def test_arrays_named_like_several_inputs(tmp_path: Path) -> None:
    several = model("float[N, 4] a, int64[N] b, bool c, float[2] d, string[N] e")
    path = save(
        tmp_path,
        a=np.ones((3, 4)),
        b=np.arange(3, dtype=np.int32),
        c=np.array(True),
        d=np.zeros(2, np.float32),
        e=np.array(["x", "y", "z"]),
    )
    batches = list(open_data(path, several, batch=2))
    assert [b.samples for b in batches] == [2, 1]
    feeds = batches[0].feeds
    assert {name: array.shape for name, array in feeds.items()} == {
        "a": (2, 4), "b": (2,), "c": (), "d": (2,), "e": (2,)
    }  # fmt: skip
    assert feeds["a"].dtype == np.float32
    assert feeds["b"].dtype == np.int64
    assert feeds["e"].tolist() == ["x", "y"]


def test_images_without_preprocessing_are_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"samples.npz: holds 8-bit images; add --preprocess: .*raw"
    ):
        open_data(save(tmp_path, images=RGB), NCHW)


@pytest.mark.parametrize(
    ("arrays", "inputs", "preprocess", "error", "message"),
    [
        ({"images": RGB[:, :5]}, "float[N, 3, 6, 8] x", "unit", DataError,
         r"'x' has shape \[5, 5, 8, 3\], but the model takes 8-bit images \[N, 6, 8, 3 or 1\]"),
        ({"x": np.ones((5, 6, 8, 3))}, "float[N, 3, 6, 8] x", None, DataError,
         r"'x' has shape \[5, 6, 8, 3\], but the model takes \[N, 3, 6, 8\]"),
        ({"x": np.ones((5, 3, 6, 8))}, "float[N, 3, 6, 8] x", "unit", SpecError,
         "holds no 8-bit images"),
        ({"images": RGB}, "float[N, 1, 6, 8] x", "imagenet", SpecError, "three channels"),
        ({"images": RGB}, "uint8[N, 3, 6, 8] x", "unit", SpecError, "takes raw pixels"),
        ({"y": RGB}, "float[N, 3, 6, 8] x", "unit", DataError, "holds 'y', but not 'x'"),
        ({"images": RGB}, "float[N, 3, 6, 8] x, float[N] z", "unit", DataError, "not 'x', 'z'"),
        ({"images": RGB[:0]}, "float[N, 3, 6, 8] x", "unit", DataError, "has no samples"),
        ({"images": RGB, "labels": np.arange(4)}, "float[N, 3, 6, 8] x", "unit", DataError,
         "4 labels for 5 samples"),
        ({"images": RGB, "labels": np.ones(5)}, "float[N, 3, 6, 8] x", "unit", DataError,
         r"labels are float64 \[5\]; wanted are integers"),
        ({"images": RGB, "labels": np.eye(5, dtype=int)}, "float[N, 3, 6, 8] x", "unit", DataError,
         r"labels are int64 \[5, 5\]"),
        ({"x": np.ones((5, 2)), "z": np.ones((4, 2))}, "float[N, 2] x, float[N, 2] z", None,
         DataError, "samples differ in number: 5 of 'x', 4 of 'z'"),
        ({"x": np.ones(())}, "float[N, 2] x", None, DataError, r"shape \[\], but the model takes"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(
    tmp_path: Path,
    arrays: dict[str, np.ndarray],
    inputs: str,
    preprocess: str | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as raised:
        open_data(save(tmp_path, **arrays), model(inputs), preprocess=preprocess)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("array", "inputs", "message"),
    [
        (np.full((2, 3), np.nan), "float[N, 3] x", "'x' holds NaN or infinity"),
        (np.full((2, 3), np.inf), "float[N, 3] x", "'x' holds NaN or infinity"),
        (np.ones((2, 3)), "int64[N, 3] x", "'x' is float64, but the model takes int64"),
    ],
)
def test_values_that_do_not_fit(
    tmp_path: Path, array: np.ndarray, inputs: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"samples.npz: {message}"):
        list(open_data(save(tmp_path, x=array), model(inputs)))


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("was unpickled",)


def test_files_that_are_no_plain_arrays(tmp_path: Path) -> None:
    whole = save(tmp_path, x=np.ones((4, 3))).read_bytes()
    files = {
        "pickled.npz": pickle.dumps(Bomb()),
        "cut.npz": whole[:-30],
        "empty.npz": b"",
        "text.npz": b"hello",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: is not a whole .npz file of plain arrays"):
            open_data(tmp_path / name, model("float[N, 3] x"))
    objects = save(tmp_path, x=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match="pickled objects are not read"):
        open_data(objects, model("float[N, 3] x"))
    np.save(tmp_path / "one.npy", np.ones((4, 3)))
    with pytest.raises(DataError, match="one array without a name"):
        open_data(tmp_path / "one.npy", model("float[N, 3] x"))


@pytest.mark.parametrize("source", ["nowhere.npz", "no/where", "C:nowhere\\x.npz"])
def test_missing_source(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_data(source, NCHW)


# -- folders ----------------------------------------------------------------------------------


def paint(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_folder_with_a_table_of_labels(tmp_path: Path) -> None:
    for index, pixels in enumerate(RGB):
        paint(tmp_path / f"{index}.png", pixels)
    (tmp_path / "labels.csv").write_text("file,label,name\n3.png,7,cat\n1.png,0,dog\n")
    batch = only(open_data(tmp_path, NCHW, preprocess="caffe"))
    bgr = RGB[[3, 1], ..., ::-1] - np.array([103.939, 116.779, 123.68])
    np.testing.assert_allclose(batch.feeds["x"], bgr.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-4)
    assert batch.labels is not None
    assert batch.labels.tolist() == [7, 0]


@pytest.mark.parametrize(("classes", "labels"), [(("cat", "ant"), [0, 1]), (("10", "9"), [10, 9])])
def test_folder_of_class_folders(
    tmp_path: Path, classes: tuple[str, str], labels: list[int]
) -> None:
    for name, pixels in zip(classes, RGB, strict=False):
        paint(tmp_path / name / "a.png", pixels)
    batch = only(open_data(tmp_path, NCHW, preprocess="raw"))
    assert batch.labels is not None
    assert batch.labels.tolist() == labels


def test_folder_without_labels(tmp_path: Path) -> None:
    paint(tmp_path / "b.PNG", RGB[0])
    paint(tmp_path / "a.png", GRAY[0])
    (tmp_path / "notes.txt").write_text("not an image")
    batch = only(open_data(tmp_path, NCHW, preprocess="raw"))
    assert batch.labels is None
    np.testing.assert_array_equal(batch.feeds["x"][0, 2], GRAY[0])
    np.testing.assert_array_equal(batch.feeds["x"][1, 2], RGB[0, ..., 2])


def test_images_of_another_size_are_resized_and_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((12, 40, 3), np.uint8)
    pixels[:, 12:28] = 200  # just the middle 16 columns of 40 are left at half the size
    paint(tmp_path / "a.png", pixels)
    x = only(open_data(tmp_path, NCHW, preprocess="raw")).feeds["x"]
    assert x.shape == (1, 3, 6, 8)
    assert (x[..., 1:-1] == 200).all()


def test_open_size_is_224_or_as_given(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", RGB[0])
    opened = model("float[N, 3, H, W] x")
    samples = open_data(tmp_path, opened, preprocess="raw")
    assert samples.assumed == "224×224 pixels"
    assert only(samples).feeds["x"].shape == (1, 3, 224, 224)
    given = open_data(tmp_path, opened, preprocess="raw", shapes={"x": (1, 3, 10, 12)})
    assert only(given).feeds["x"].shape == (1, 3, 10, 12)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: has no images"):
        open_data(tmp_path / "empty", NCHW, preprocess="raw")
    paint(tmp_path / "a.png", RGB[0])
    with pytest.raises(DataError, match="does not take just images"):
        open_data(tmp_path, model("float[N, 4] x"), preprocess="raw")
    with pytest.raises(SpecError, match="add --preprocess"):
        open_data(tmp_path, NCHW)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a.png: cannot be read as an image"):
        list(open_data(tmp_path, NCHW, preprocess="raw"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\nb.png,1\n", r"labels.csv, line 2: there is no image 'b.png'"),
        ("file,label\na.png,cat\n", r"labels.csv, line 2: wants the columns file,label"),
        ("a.png,1\na.png,2\n", r"labels.csv, line 2: wants the columns file,label"),
        ("file,label\n", "has no images"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, table: str, message: str) -> None:
    paint(tmp_path / "a.png", RGB[0])
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, NCHW, preprocess="raw")


def test_folder_without_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"pip install 'pwopt\[images\]'"):
        open_data(tmp_path, NCHW, preprocess="raw")


# -- generators and readers -------------------------------------------------------------------


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
        "number = 3\n"
    )
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


# -- random -----------------------------------------------------------------------------------


def test_random_data_for_every_type_of_input() -> None:
    mixed = model(
        "float[N, 3, H, W] a, float16[N, 4] b, double c, int64[N, T] d, uint8[N, 5] e, bool[N] f"
    )
    samples = random_data(mixed, {"a": (2, 3, 8, 10)}, batches=3, seed=7)
    assert samples.count == 6
    batches = list(samples)
    assert len(batches) == 3
    feeds = batches[0].feeds
    assert {name: array.shape for name, array in feeds.items()} == {
        "a": (2, 3, 8, 10), "b": (2, 4), "c": (), "d": (2, 16), "e": (2, 5), "f": (2,)
    }  # fmt: skip
    assert [array.dtype.name for array in feeds.values()] == [
        "float32", "float16", "float64", "int64", "uint8", "bool"
    ]  # fmt: skip
    assert set(np.unique(feeds["d"])) <= {0, 1}
    assert abs(float(feeds["a"].mean())) < 0.2
    for one, other in zip(batches, samples, strict=True):
        for name, array in one.feeds.items():
            np.testing.assert_array_equal(array, other.feeds[name])
    assert not np.array_equal(batches[0].feeds["a"], batches[1].feeds["a"])
    changed = next(iter(random_data(mixed, {"a": (2, 3, 8, 10)}, seed=8)))
    assert not np.array_equal(batches[0].feeds["a"], changed.feeds["a"])


def test_random_data_names_what_it_assumed() -> None:
    samples = random_data(model("float[N, 3, H, W] x"), batch=2)
    assert samples.assumed == "N=2, H=224, W=224"


def test_random_data_refuses_strings() -> None:
    with pytest.raises(DataError, match=r"'x' is of type object.*--data"):
        random_data(model("string[N] x"))


def test_resize_repeats_rows_of_the_inputs_that_count_samples() -> None:
    samples = random_data(model("float[N, 3] x, float[2] d"), batch=2)
    feeds = next(iter(samples)).feeds
    resized = samples.resize(feeds, 3)
    assert samples.rows(resized) == 3
    np.testing.assert_array_equal(resized["x"], feeds["x"][[0, 1, 0]])
    assert resized["d"].shape == (2,)


def test_fixed_batch() -> None:
    assert data.fixed_batch(model("float[4, 3] x")) == 4
    assert data.fixed_batch(model("float[N, 3] x, float[2] d")) is None
    assert data.fixed_batch(model("float[1, 3] x, float[5] d")) == 1
    assert data.fixed_batch(model("float x")) is None


def test_folder_reads_one_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, pixels in enumerate(RGB):
        paint(tmp_path / f"{index}.png", pixels)
    read: list[Path] = []
    original = data._read_image
    monkeypatch.setattr(
        data, "_read_image", lambda path, *rest: (read.append(path), original(path, *rest))[1]
    )
    batches: Iterator[data.Batch] = iter(open_data(tmp_path, NCHW, preprocess="raw", batch=2))
    next(batches)
    assert len(read) == 2
