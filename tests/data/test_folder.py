import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import GRAY, NCHW, RGB, model, only

from pwopt.data import Batch, folder, open_data
from pwopt.errors import DataError, SpecError


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


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(("cat", "ant"), [0, 1]), (("10", "9"), [10, 9]), (("7" * 24, "8"), [0, 1])],
)
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


def test_only_regular_files_are_images(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", RGB[0])
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").mkdir()
    assert only(open_data(tmp_path, NCHW, preprocess="raw")).samples == 1


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
        (f"file,label\na.png,{'9' * 24}\n", r"labels.csv, line 2: .* at most 18 digits"),
        (f"file,label\na.png,{'9' * 5000}\n", r"labels.csv, line 2: .* at most 18 digits"),
        ("a.png,1\na.png,2\n", r"labels.csv, line 1: wants the columns file,label"),
        ("file;label\na.png;2\n", r"labels.csv, line 1: wants the columns file,label"),
        ("file;label\n", r"labels.csv, line 1: wants the columns file,label"),
        ("", r"labels.csv, line 1: wants the columns file,label"),
        ("file,label\n", "labels.csv: lists no images"),
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


def test_folder_reads_one_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, pixels in enumerate(RGB):
        paint(tmp_path / f"{index}.png", pixels)
    read: list[Path] = []
    original = folder.read_image
    monkeypatch.setattr(
        folder, "read_image", lambda path, *rest: (read.append(path), original(path, *rest))[1]
    )
    batches: Iterator[Batch] = iter(open_data(tmp_path, NCHW, preprocess="raw", batch=2))
    next(batches)
    assert len(read) == 2


def test_images_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, pixels in enumerate(RGB):
        paint(tmp_path / f"{index}.png", pixels)
    (tmp_path / "3.png").write_bytes(b"nothing")
    read: list[str] = []
    original = folder.read_image
    monkeypatch.setattr(
        folder, "read_image", lambda path, *rest: (read.append(path.name), original(path, *rest))[1]
    )
    samples = open_data(tmp_path, NCHW, preprocess="raw")
    x = samples.at([4, 1]).feeds["x"]
    np.testing.assert_array_equal(x, RGB[[4, 1]].transpose(0, 3, 1, 2))
    assert read == ["4.png", "1.png"]
    with pytest.raises(DataError, match=r"3.png: cannot be read as an image") as raised:
        samples.at([2, 3])
    assert "\n" not in str(raised.value)
