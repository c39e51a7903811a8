import errno
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples import GRAY, NCHW, RGB, model, only

from pwopt.data import arrays, open_data
from pwopt.errors import DataError, SpecError


def save(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "samples.npz"
    np.savez(path, **arrays)
    return path


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


def test_samples_by_number(tmp_path: Path) -> None:
    samples = open_data(
        save(tmp_path, images=RGB, labels=np.arange(5)), NCHW, preprocess="raw", batch=2
    )
    batch = samples.at([4, 0, 4])
    np.testing.assert_array_equal(batch.feeds["x"], RGB[[4, 0, 4]].transpose(0, 3, 1, 2))
    assert batch.labels is not None
    assert batch.labels.tolist() == [4, 0, 4]
    path = save(tmp_path, x=np.array([[1], [np.nan]]), shared=np.arange(2.0))
    samples = open_data(path, model("float[N, 1] x, float[2] shared"))
    assert samples.at([0]).feeds["shared"].tolist() == [0, 1]
    with pytest.raises(DataError, match="'x' holds NaN"):
        samples.at([1])


def test_large_arrays_are_unpacked_into_a_file_that_is_gone_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))
    monkeypatch.setattr(arrays, "IN_MEMORY", 200)
    unpacked: list[Any] = []
    original = np.load
    monkeypatch.setattr(
        np, "load", lambda *a, **k: (unpacked.append(k.get("mmap_mode")), original(*a, **k))[1]
    )
    for write in (np.savez, np.savez_compressed):
        unpacked.clear()
        path = tmp_path / "samples.npz"
        write(path, images=RGB, labels=np.arange(5))
        samples = open_data(path, NCHW, preprocess="raw", batch=2)
        assert unpacked == [None, "r"]  # the archive, and the images, but not the labels
        assert not list(room.iterdir())
        x = np.concatenate([batch.feeds["x"] for batch in samples])
        np.testing.assert_array_equal(x, RGB.transpose(0, 3, 1, 2))
        assert samples.at([3]).feeds["x"].flags.writeable


def test_large_arrays_that_cannot_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrays, "IN_MEMORY", 200)
    path = save(tmp_path, images=RGB)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("zipfile.shutil.copyfileobj", full)
        with pytest.raises(
            DataError, match=r"'images.npy' cannot be .* \(No space left on device\); set TMPDIR"
        ):
            open_data(path, NCHW, preprocess="raw")
    path.write_bytes(whole.replace(RGB.tobytes()[:20], bytes(20)))
    with pytest.raises(DataError, match="is not a whole"):
        open_data(path, NCHW, preprocess="raw")
    objects = save(tmp_path, x=np.array([Bomb()] * 100, dtype=object))
    with pytest.raises(DataError, match="pickled objects are not read"):
        open_data(objects, model("float[N, 3] x"))


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
        ({"images": RGB, "labels": np.full(5, 2**63, np.uint64)}, "float[N, 3, 6, 8] x", "unit",
         DataError, "label 9223372036854775808 is too large"),
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
        (np.full((2, 3), 1e300), "float[N, 3] x", "'x' holds NaN or infinity as float32"),
        (np.full((2, 3), 70_000), "float16[N, 3] x", "'x' holds NaN or infinity as float16"),
        (np.full((2, 3), 2**40), "int32[N, 3] x", "'x' holds numbers beyond int32"),
        (np.full((2, 3), 2**63, np.uint64), "int64[N, 3] x", "'x' holds numbers beyond int64"),
        (np.ones((2, 3)), "int64[N, 3] x", "'x' is float64, but the model takes int64"),
    ],
)
def test_values_that_do_not_fit(
    tmp_path: Path, array: np.ndarray, inputs: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"samples.npz: {message}"):
        list(open_data(save(tmp_path, x=array), model(inputs)))


def test_pixels_that_preprocessing_takes_beyond_the_type(tmp_path: Path) -> None:
    images = save(tmp_path, images=RGB)
    for inputs, preprocess in (
        ("float[N, 3, 6, 8] x", "scale=3e38"),
        ("float16[N, 3, 6, 8] x", "scale=1000"),
    ):
        samples = open_data(images, model(inputs), preprocess=preprocess)
        with pytest.raises(DataError, match=r"infinity as float.*preprocessing"):
            list(samples)


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
