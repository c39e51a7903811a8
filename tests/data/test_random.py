import numpy as np
import pytest
from samples import model

from pwopt.data import open_data, random_data
from pwopt.errors import DataError


def test_random_data_for_every_type_of_input() -> None:
    mixed = model(
        "float[N, 3, H, W] a, float16[N, 4] b, double c, int64[N, T] d, uint8[N, 5] e, bool[N] f"
    )
    samples = random_data(mixed, {"a": (2, 3, 8, 10)}, seed=7)
    assert samples.count == 8
    batches = list(samples)
    assert len(batches) == 4
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
    with pytest.raises(DataError, match=r"'x' takes strings, .*--data"):
        random_data(model("string[N] x"))


@pytest.mark.parametrize("kind", ["bfloat16", "float8e4m3fn", "float8e5m2"])
def test_types_that_onnxruntime_does_not_take(kind: str) -> None:
    """It raises "Numpy_type 256 can't be converted to MLDataType", whoever gives the values."""
    one = model(f"{kind}[N, 4] x")
    samples = [random_data(one), open_data(lambda: [{"x": np.ones((2, 4), np.float32)}], one)]
    for each in samples:
        with pytest.raises(DataError, match=f"'x' takes {kind[:6]}.* does not take from Python"):
            list(each)
