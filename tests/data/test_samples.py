import numpy as np
from samples import model

from pwopt.data import fixed_batch, random_data
from pwopt.shapes import inputs


def test_resize_repeats_rows_of_the_inputs_that_count_samples() -> None:
    samples = random_data(model("float[N, 3] x, float[2] d"), batch=2)
    feeds = next(iter(samples)).feeds
    resized = samples.resize(feeds, 3)
    assert samples.rows(resized) == 3
    np.testing.assert_array_equal(resized["x"], feeds["x"][[0, 1, 0]])
    assert resized["d"].shape == (2,)


def test_fixed_batch() -> None:
    assert fixed_batch(inputs(model("float[4, 3] x"))) == 4
    assert fixed_batch(inputs(model("float[N, 3] x, float[2] d"))) is None
    assert fixed_batch(inputs(model("float[1, 3] x, float[5] d"))) == 1
    assert fixed_batch(inputs(model("float x"))) is None
