"""Network: whole graphs as onnxruntime runs them, weights that are trained and put back."""

import copy
import itertools
import runpy
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import ASSETS, SMALL, assert_close, needs_assets, parse, random_feeds, run, values
from onnx import TensorProto, numpy_helper

torch = pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

from pwopt.errors import LearnError  # noqa: E402  # after the skip
from pwopt.learn import network as network_module  # noqa: E402
from pwopt.learn.network import Network, unsupported  # noqa: E402
from pwopt.learn.operators import OPERATORS  # noqa: E402
from pwopt.model import Model  # noqa: E402
from pwopt.models import BUILDERS, DEMO_MODEL  # noqa: E402

NET = """
    net (float[N,2,6,6] x) => (float[N,3] y)
    <float[4,2,3,3] conv.weight, float[4] conv.bias, float[4,4,1,1] point,
     float[3,4] head, float[3] head.bias>
    {
        a = Conv<pads = [1,1,1,1]>(x, conv.weight, conv.bias)
        b = Relu(a)
        c = Conv(b, point)
        d = GlobalAveragePool(c)
        e = Flatten(d)
        y = Gemm<transB = 1>(e, head, head.bias)
    }
"""


def tensors(feeds: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) for name, value in feeds.items()}


def outputs(network: Network, feeds: dict[str, Any]) -> list[Any]:
    with torch.no_grad():
        results = network(tensors(feeds))
    return [results[name].numpy() for name in network.outputs]


def assert_runs_as_onnxruntime(model: Model, **sizes: int) -> Network:
    """Compare at two batch sizes, and see that nothing is changed where nothing is learned."""
    network = Network(model)
    for batch in (1, 2):
        feeds = random_feeds(model, batch=batch, **sizes)
        assert_close(outputs(network, feeds), run(model, feeds))
    assert network.trained().to_proto() == model.to_proto()
    return network


def disturb(network: Network) -> None:
    """Change every weight."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.weights.values():
            weight += 0.1 * torch.rand_like(weight)


# -- whole networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_builders(name: str) -> None:
    assert_runs_as_onnxruntime(Model(BUILDERS[name](**SMALL.get(name, {}))))


def test_demo() -> None:
    network = assert_runs_as_onnxruntime(Model.load(DEMO_MODEL))
    assert len(network.weights) == 8 + 2 * 8 + 2  # convs, scale and bias of each BN, the Gemm


@needs_assets
@pytest.mark.parametrize(
    ("name", "side"),
    [("vgg16_cifar10", 32), ("resnet56_cifar10", 32), ("smallvgg_cifar10", 32),
     ("resnet50_imagenet", 224)],
)  # fmt: skip
def test_trained_networks(
    name: str, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ASSETS / "models" / f"{name}.onnx"
    if not path.is_file():  # stored in halves
        monkeypatch.setattr(sys, "argv", ["unpack.py", str(tmp_path)])
        runpy.run_path(str(ASSETS / "unpack.py"), run_name="__main__")
        path = tmp_path / path.name
    assert_runs_as_onnxruntime(Model.load(path), side=side)


# -- which constants are trained --------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "text", "trained"),
    [
        ("float[4,3,1,1] w, float[4] b", "y = Conv(x, w, b)", "w b"),
        ("float[3,4,2,2] w", "y = ConvTranspose(x, w)", "w"),
        ("float[5,4] w, float[4] b", "{ a = MatMul(x, w) y = Add(a, b) }", "w b"),
        ("float[3] s, float[3] b, float[3] m, float[3] var",
         "y = BatchNormalization(x, s, b, m, var)", "s b"),
        ("float[3] s, float[3] b", "y = InstanceNormalization(x, s, b)", "s b"),
        ("float[5] s, float[5] b", "y = LayerNormalization(x, s, b)", "s b"),
        ("float[3,1,1] a", "y = PRelu(x, a)", "a"),
        ("float[3,1,1] a, float b", "{ c = Mul(x, a) y = Mul(c, b) }", "a"),
        ("float[1] a", "y = Add(x, a)", ""),
        ("float[3,1,1] a, float[3,1,1] b", "{ c = Sub(x, a) y = Div(c, b) }", ""),
        ("float low, float high", "y = Clip(x, low, high)", ""),
        ("float[4] s = {1,1,2,2}", 'y = Resize<mode="nearest">(x, , s)', ""),
        ("float[5,4] w", "{ t = Transpose(w) u = Identity(t) v = Transpose(u) y = MatMul(x, v) }",
         "w"),
        ("float[4,3,1,1] w, float[4] b", "{ a = Conv(x, w, b) c = Cast<to=1>(b) "
         "d = Unsqueeze<axes=[1,2]>(c) y = Add(a, d) }", "w b"),
        ("float[4,3,1,1] w, float[4] b", "{ a = Conv(x, w, b) c = Unsqueeze<axes=[1,2]>(b) "
         "y = Sub(a, c) }", "w"),
        ("float[3] s, float[3] b", "y = BatchNormalization(x, s, b, b, s)", ""),
        ("float[4] s = {1,1,2,2}", "{ n = Shape(x) f = Cast<to=1>(n) g = Mul(f, s) "
         "h = Cast<to=7>(g) y = Resize(x, , , h) }", ""),
        ("float[4] s = {1,1,2,2}, float[4] t = {1,1,1,1}",
         "{ u = Mul(s, t) y = Resize(x, , u) }", ""),
    ],
)  # fmt: skip
def test_what_is_trained(weights: str, text: str, trained: str) -> None:
    opset = 12 if "Unsqueeze" in text else 17
    body = text if "{" in text else f"{{ {text} }}"
    model = parse(
        f'<ir_version: 8, opset_import: ["" : {opset}]> '
        f"m (float[2,3,4,5] x) => (float[] y) <{weights}> {body}"
    )
    network = Network(model)
    assert sorted(network.weights) == sorted(trained.split())


def test_a_shared_weight_is_one_parameter() -> None:
    model = parse(
        "m (float[N,4,5,5] x) => (float[] y) <float[4,4,3,3] w> "
        "{ a = Conv(x, w) b = Relu(a) y = Conv(b, w) }"
    )
    network = assert_runs_as_onnxruntime(model)
    (weight,) = network.parameters()
    assert network.weights["w"] is weight


def test_weights_of_constant_nodes_are_trained() -> None:
    model = parse("m (float[N,2] x) => (float[] y) { w = Constant<value = float[2,2] {1,2,3,4}>() "
                  "y = MatMul(x, w) }")  # fmt: skip
    network = assert_runs_as_onnxruntime(model)
    with torch.no_grad():
        network.weights["w"].mul_(2)
    feeds = random_feeds(model)
    assert_close(run(network.trained(), feeds), [2 * y for y in run(model, feeds)])


def test_what_a_caller_may_override_is_not_trained() -> None:
    model = parse("m (float[N,2] x, float[2,2] w) => (float[] y) { y = MatMul(x, w) }")
    model.proto.graph.initializer.append(numpy_helper.from_array(np.eye(2, dtype=np.float32), "w"))
    network = Network(model)
    x = torch.rand(3, 2)
    assert not network.weights
    assert network.inputs == ["x"]
    torch.testing.assert_close(network({"x": x})["y"], x)
    torch.testing.assert_close(network({"x": x, "w": 2 * torch.eye(2)})["y"], 2 * x)


# -- weights go back --------------------------------------------------------------------------


def test_weights_go_back_by_name_and_nothing_else_changes() -> None:
    model = parse(NET)
    model.proto.doc_string, model.proto.graph.node[0].name = "kept", "first"
    model.annotate("author", "somebody")
    network = Network(model)
    disturb(network)
    trained = network.trained()
    before, after = values(model.proto), values(trained.to_proto())
    assert before.keys() == after.keys() == network.weights.keys()
    assert all((before[name] != after[name]).all() for name in before)

    proto = trained.to_proto()
    for tensor, original in zip(
        proto.graph.initializer, model.proto.graph.initializer, strict=True
    ):
        tensor.CopyFrom(original)
    assert proto == model.proto
    feeds = random_feeds(model, batch=3)
    assert_close(outputs(network, feeds), run(trained, feeds))


def test_the_model_given_is_left_alone() -> None:
    model = parse(NET)
    before = model.to_proto()
    network = Network(model)
    disturb(network)
    network.trained().annotate("learned", "yes")
    assert model.to_proto() == before
    assert "learned" not in network.trained().metadata()


def test_external_weights(tmp_path: Path) -> None:
    model = parse(NET.replace("4,4,1,1", "400,4,1,1").replace("3,4]", "3,400]"))
    source = tmp_path / "source.onnx"
    onnx.save(model.to_proto(), source, save_as_external_data=True, size_threshold=256)
    network = Network(Model.load(source))
    feeds = random_feeds(model)
    assert_close(outputs(network, feeds), run(model, feeds))
    disturb(network)
    network.trained().save(tmp_path / "trained.onnx")
    assert {p.suffix for p in tmp_path.iterdir()} >= {".data"}
    session = onnxruntime.InferenceSession(
        str(tmp_path / "trained.onnx"), providers=["CPUExecutionProvider"]
    )
    assert_close(outputs(network, feeds), session.run(None, feeds))


def test_half_precision_is_computed_in_float32_and_written_back_as_it_was() -> None:
    model = parse(NET.replace("float[", "float16["))
    network = Network(model)
    assert {weight.dtype for weight in network.weights.values()} == {torch.float32}
    feeds = random_feeds(model)
    (y,) = outputs(network, feeds)
    (expected,) = run(model, feeds)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected.astype(np.float32), rtol=1e-2, atol=1e-2)
    assert network.trained().to_proto() == model.to_proto()
    disturb(network)
    types = {t.data_type for t in network.trained().to_proto().graph.initializer}
    assert types == {TensorProto.FLOAT16}


def test_copies_are_independent() -> None:
    network = Network(parse(NET))
    twin = copy.deepcopy(network)
    disturb(twin)
    assert (twin.weights["head"] != network.weights["head"]).all()
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin.weights["head"], network.weights["head"])


def test_the_state_is_the_weights() -> None:
    network = Network(Model.load(DEMO_MODEL))
    assert len(network.state_dict()) == len(network.weights)


# -- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{ a = NonZero(x) b = Det(x) y = Add(b, b) }", ["NonZero (opset 17)", "Det (opset 17)"]),
        ('{ y = Resize<mode="cubic">(x, , s) }', ["Resize with mode=cubic ('y')"]),
        ("{ y, indices = MaxPool<kernel_shape=[2,2]>(x) }", ["MaxPool with a second output ('y')"]),
        ('{ y = AveragePool<kernel_shape=[2,2], auto_pad="SAME_UPPER", strides=[4,4]>(x) }',
         ["AveragePool with auto_pad=SAME_UPPER and strides of more than 3 ('y')"]),
        ("{ y = com.example.Swirl(x) }", ["com.example.Swirl"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_in_one_line(text: str, missing: Sequence[str]) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]> '
        f"m (float[2,3,4,4] x) => (float y) <float[4] s = {{1,1,2,2}}> {text}"
    )
    model = Model(proto)
    assert unsupported(model) == missing
    with pytest.raises(LearnError) as caught:
        Network(model)
    assert str(caught.value) == (
        f"m: cannot be learned, for learning does not know {', '.join(missing)}; "
        "replace them, or rewrite without learning"
    )


def test_old_opsets_are_missing() -> None:
    model = parse('<ir_version: 3, opset_import: ["" : 5]> m (float[2] x) => (float[2] y) '
                  "{ y = Relu(x) }")  # fmt: skip
    assert unsupported(model) == ["opset 5 (the oldest is 6)"]


def test_what_opset_6_broadcasts_in_its_own_way_is_missing() -> None:
    model = parse('<ir_version: 3, opset_import: ["" : 6]> m (float[2,3] x, float[2] b) => '
                  "(float[2,3] y) { y = Add<axis=0, broadcast=1>(x, b) }")  # fmt: skip
    assert unsupported(model) == ["Add with axis (opset 6)"]


def test_dropout_that_trains_is_missing() -> None:
    model = parse("m (float[2] x) => (float[] y) <float r = {0.5}, bool t = {1}> "
                  "{ y = Dropout(x, r, t) }")  # fmt: skip
    assert unsupported(model) == ["Dropout that trains ('y')"]


# -- inner tensors ----------------------------------------------------------------------------


def test_inner_tensors_are_returned_beside_the_outputs() -> None:
    model = parse(NET)
    feeds = random_feeds(model)
    found = Network(model)(tensors(feeds), also=["b", "x", "y"])
    assert list(found) == ["y", "b", "x"]
    torch.testing.assert_close(found["b"], found["b"].relu())
    torch.testing.assert_close(found["x"], torch.from_numpy(feeds["x"]))


def test_readers_see_what_is_given_and_the_caller_what_was_computed() -> None:
    model = parse(NET)
    feeds = tensors(random_feeds(model, batch=2))
    network = Network(model)
    plain = network(feeds, also=["b", "c"])
    given = {"b": torch.rand_like(plain["b"])}
    found = network(feeds, also=["b", "c"], given=given)
    torch.testing.assert_close(found["b"], plain["b"])
    expected = torch.nn.functional.conv2d(given["b"], network.weights["point"])
    torch.testing.assert_close(found["c"], expected)
    assert not torch.equal(found["y"], plain["y"])


def test_gradients_end_at_what_is_given() -> None:
    model = parse(NET)
    feeds = tensors(random_feeds(model))
    network = Network(model)
    network(feeds, given={"b": torch.rand(1, 4, 6, 6)})["y"].sum().backward()
    assert network.weights["conv.weight"].grad is None
    assert network.weights["point"].grad.abs().sum() > 0


def test_an_input_may_be_given() -> None:
    network = Network(parse(NET))
    x, other = torch.rand(1, 2, 6, 6), torch.rand(1, 2, 6, 6)
    found = network({"x": x}, also=["x"], given={"x": other})
    torch.testing.assert_close(found["x"], x)
    torch.testing.assert_close(found["y"], network({"x": other})["y"])


# -- gradients --------------------------------------------------------------------------------


def test_gradients_are_those_of_the_function() -> None:
    model = parse(NET.replace("float[", "double["))
    network = Network(model)
    feeds = tensors(random_feeds(model, batch=2))

    def loss() -> Any:
        return network(feeds)["y"].square().sum()

    loss().backward()
    step = 1e-6
    for name, weight in network.weights.items():
        flat = weight.detach().reshape(-1)
        index = int(weight.grad.reshape(-1).abs().argmax())
        gradient = float(weight.grad.reshape(-1)[index])
        assert gradient != 0, name
        around = []
        for change in (step, -2 * step):
            flat[index] += change
            around.append(loss().item())
        flat[index] += step
        assert gradient == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5), name


@pytest.mark.parametrize("name", ["inception_naive", "resnet_bottleneck", "mlp_head"])
def test_every_weight_gets_a_gradient(name: str) -> None:
    model = Model(BUILDERS[name](**SMALL.get(name, {})))
    network = Network(model)
    results = network(tensors(random_feeds(model, batch=2)))
    sum(results[output].square().sum() for output in network.outputs).backward()
    assert all(weight.grad is not None for weight in network.parameters())
    assert all(weight.grad.isfinite().all() for weight in network.parameters())


# -- how it runs ------------------------------------------------------------------------------


def test_constants_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(node: Any, *inputs: Any) -> Any:
        calls.append(node.name)
        return OPERATORS["Exp"](node, *inputs)

    monkeypatch.setattr(network_module, "OPERATORS", {**OPERATORS, "Sqrt": counted})
    model = parse("m (float[2] x) => (float[] y) <float[2] c = {1,4}> "
                  "{ a = Sqrt(c) b = Neg(a) y = Sub(x, b) }")  # fmt: skip
    network = Network(model)
    for _ in range(3):
        network({"x": torch.ones(2)})
    assert calls == ["a"]


def test_values_are_dropped_when_nobody_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    most = 0

    def watched(node: Any, x: Any) -> Any:
        nonlocal most
        y = x.relu()
        alive.append(weakref.ref(y))
        most = max(most, sum(reference() is not None for reference in alive))
        return y

    monkeypatch.setattr(network_module, "OPERATORS", {**OPERATORS, "Relu": watched})
    names = ["x", *(f"t{i}" for i in range(20)), "y"]
    body = " ".join(f"{b} = Relu({a})" for a, b in itertools.pairwise(names))
    network = Network(parse(f"m (float[2] x) => (float[2] y) {{ {body} }}"))
    with torch.no_grad():
        network({"x": torch.ones(2)})
    assert most == 2


def test_sizes_never_come_from_the_device() -> None:
    """On the device `meta` nothing can be read back, and nothing from elsewhere be mixed in."""
    model = parse(
        """
        m (float[N,4,H,W] x) => (float[] y)
        <float[4,4,1,1] w, float low = {-1}, float high = {1}, int64[1] first = {0},
         int64[1] minus = {-1}, float[4] scales = {1,1,2,2}, int64[1] ends = {3},
         int64[1] axis = {2}, int64[2] channels = {2,0}, float[2,1,1] shift>
        {
            a = Conv(x, w)
            b = Clip(a, low, high)
            c = Resize<mode = "linear">(b, , scales)
            d = Slice(c, first, ends, axis)
            e = Gather<axis = 1>(d, channels)
            f = Add(e, shift)
            s = Shape(x)
            n = Gather(s, first)
            target = Concat<axis = 0>(n, minus)
            y = Reshape(f, target)
        }
        """
    )
    feeds = random_feeds(model, batch=2, side=5)
    network = Network(model)
    assert_close(outputs(network, feeds), run(model, feeds))
    result = network.to("meta")({"x": torch.empty(2, 4, 5, 5, device="meta")})["y"]
    assert result.device.type == "meta"
    assert result.shape == (2, 2 * 3 * 10)
