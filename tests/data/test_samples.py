from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from samples import model

from pwopt.data import fixed_batch, open_data, random_data
from pwopt.data.samples import fed_rows
from pwopt.errors import DataError
from pwopt.shapes import inputs


def test_resize_repeats_rows_of_the_inputs_that_count_samples() -> None:
    samples = random_data(model("float[N, 3] x, float[2] d"), batch=2)
    feeds = next(iter(samples)).feeds
    resized = samples.resize(feeds, 3)
    assert fed_rows(resized, samples.inputs) == 3
    np.testing.assert_array_equal(resized["x"], feeds["x"][[0, 1, 0]])
    assert resized["d"].shape == (2,)


def test_fixed_batch() -> None:
    assert fixed_batch(inputs(model("float[4, 3] x"))) == 4
    assert fixed_batch(inputs(model("float[N, 3] x, float[2] d"))) is None
    assert fixed_batch(inputs(model("float[1, 3] x, float[5] d"))) == 1
    assert fixed_batch(inputs(model("float x"))) is None


def test_singles_join_again_without_the_rows_that_fill_up() -> None:
    def feeds() -> Iterator[tuple[dict[str, np.ndarray], list[int]]]:
        yield {"x": np.array([[1.0], [2.0], [3.0]])}, [1, 2, 3]
        yield {"x": np.array([[4.0]])}, [4]

    samples = open_data(feeds, model("float[3, 1] x"))
    singles = list(samples.singles())
    assert [single.feeds["x"].shape for single in singles] == [(1, 1)] * 4
    joined = samples.join(singles)
    assert joined.feeds["x"][:, 0].tolist() == [1, 2, 3, 4]
    assert joined.labels is not None
    assert joined.labels.tolist() == [1, 2, 3, 4]
    assert joined.samples == 4


@pytest.mark.parametrize("size", ["N", "2"])
@pytest.mark.parametrize("random_access", [True, False])
def test_samples_without_some_are_numbered_anew(
    tmp_path: Path, random_access: bool, size: str
) -> None:
    x, labels = np.arange(6.0)[:, None], np.arange(6)

    def feeds() -> Iterator[tuple[dict[str, np.ndarray], list[int]]]:
        for row in range(0, 6, 2):
            yield {"x": x[row : row + 2]}, [row, row + 1]

    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    samples = open_data(
        tmp_path / "data.npz" if random_access else feeds, model(f"double[{size}, 1] x")
    )
    left = samples.without([1, 4])
    for _ in range(2):  # iterating again starts anew
        singles = [*left.singles()]
        assert [single.feeds["x"].item() for single in singles] == [0, 2, 3, 5]
        assert [single.labels for single in singles] == [0, 2, 3, 5]
    assert samples.count == (6 if random_access else None)
    if random_access:
        assert left.count == 4
        assert left.at([3, 1]).feeds["x"].tolist() == [[5], [2]]


def test_samples_that_differ_cannot_be_joined() -> None:
    def feeds() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": np.ones((1, 2)), "d": np.zeros(2)}
        yield {"x": np.ones((1, 3)), "d": np.zeros(2)}
        yield {"x": np.ones((1, 3)), "d": np.ones(2)}

    samples = open_data(feeds, model("float[N, W] x, float[2] d"))
    one, other, last = samples.singles()
    with pytest.raises(DataError, match=r"differ in shape: 'x' is \[1, 2\] and \[1, 3\]"):
        samples.join([one, other])
    with pytest.raises(DataError, match="differ in 'd', which all of a batch share"):
        samples.join([other, last])
