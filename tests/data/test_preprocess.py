import numpy as np
import pytest

from pwopt.data import Preprocess
from pwopt.errors import SpecError


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
     "scale=1/", "scale=1e999", "scale=1e99999999", "scale=1e39", "mean=nan", "std=1/inf",
     "std=1e-99", "order=rbg", "unit,order=bgr", "gamma=2"],
)  # fmt: skip
def test_preprocess_that_is_wrong_names_the_choices(text: str) -> None:
    with pytest.raises(SpecError, match=r"unit .* imagenet"):
        Preprocess.parse(text)
