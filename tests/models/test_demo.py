"""The trained demo model and its samples, as they lie in the package."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pwopt.models import BUILDERS, DEMO_CALIBRATION, DEMO_EVALUATION, DEMO_MODEL


@pytest.fixture
def model() -> onnx.ModelProto:
    return onnx.load(DEMO_MODEL)


def test_files_are_small() -> None:
    assert DEMO_MODEL.stat().st_size <= 8e6
    files = (DEMO_MODEL, DEMO_CALIBRATION, DEMO_EVALUATION)
    assert sum(file.stat().st_size for file in files) <= 9e6


def test_model_is_the_builders_graph_with_other_weights(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    drawn = BUILDERS["naive_inception_net"]()
    for mine, theirs in zip(model.graph.initializer, drawn.graph.initializer, strict=True):
        assert (mine.name, mine.dims, mine.data_type) == (
            theirs.name,
            theirs.dims,
            theirs.data_type,
        )
        assert mine.raw_data != theirs.raw_data
    for proto in (model, drawn):
        del proto.graph.initializer[:]
    assert model == drawn


def test_input_and_output(model: onnx.ModelProto) -> None:
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"images": ["N", 1, 28, 28], "logits": ["N", 10]}


def test_wide_kernels_read_unreduced_maps(model: onnx.ModelProto) -> None:
    weights = {w.name: tuple(w.dims) for w in model.graph.initializer}
    convs = [weights[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    assert sorted(shape for shape in convs if shape[1] >= 192) == [
        (32, 192, 5, 5),
        (32, 384, 5, 5),
        (64, 192, 1, 1),
        (64, 384, 1, 1),
        (96, 192, 3, 3),
        (96, 384, 3, 3),
    ]
    assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) == len(convs)


@pytest.mark.parametrize(("path", "per_class"), [(DEMO_CALIBRATION, 50), (DEMO_EVALUATION, 200)])
def test_samples_are_balanced(path: Path, per_class: int) -> None:
    with np.load(path) as sample:
        images, labels = sample["images"], sample["labels"]
    assert images.shape == (10 * per_class, 28, 28, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [per_class] * 10


def test_calibration_and_evaluation_share_no_image() -> None:
    with np.load(DEMO_CALIBRATION) as calibration, np.load(DEMO_EVALUATION) as evaluation:
        seen = {image.tobytes() for image in calibration["images"]}
        assert not any(image.tobytes() in seen for image in evaluation["images"])


def test_top1_is_at_least_92_percent() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(DEMO_MODEL, options, providers=["CPUExecutionProvider"])
    with np.load(DEMO_EVALUATION) as evaluation:
        images, labels = evaluation["images"], evaluation["labels"]
    x = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    predictions = [
        session.run(["logits"], {"images": batch})[0].argmax(1) for batch in np.split(x, 20)
    ]
    assert np.mean(np.concatenate(predictions) == labels) >= 0.92
