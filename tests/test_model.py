"""Loading, saving, external data, and what a broken file is told."""

import errno
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from helpers import parse
from onnx import ModelProto, TensorProto, external_data_helper, helper, numpy_helper

import pwopt.external
import pwopt.model
from pwopt.errors import ModelError, PwoptError
from pwopt.model import Model

SMALL_NET = "net (float[N,4] x) => (float[N,4] y) <float[4] w> { a = Add(x, w) y = Relu(a) }"
NET = """
net (float[N,64] x) => (float[N,64] y) <float[64,64] w, float[64,64] v, float[64] b> {
    p = MatMul(x, w) q = MatMul(p, v) y = Add(q, b)
}
"""


def save_external(model: Model, path: Path, data: str = "weights.bin") -> None:
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    onnx.save(proto, path, save_as_external_data=True, location=data, size_threshold=0)


def in_memory(model: Model) -> ModelProto:
    proto = model.to_proto()
    pwopt.external.load(proto, model.folder)
    return proto


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A file whose weights, the small bias too, lie beside it."""
    path = tmp_path / "models" / "net.onnx"
    path.parent.mkdir()
    save_external(parse(NET), path)
    return path


def weights(model: Model) -> dict[str, np.ndarray]:
    found = {}
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                found[tensor.name] = tensor.values
    return found


def assert_same_weights(model: Model, expected: Model) -> None:
    ours, theirs = weights(model), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": np.ones((1, 64), np.float32)})
    return np.asarray(output)


# -- loading and saving -----------------------------------------------------------------------


def test_saving_a_loaded_model_gives_the_same_file(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    before.write_bytes(parse(NET).proto.SerializeToString())
    Model.load(before).save(after)
    assert after.read_bytes() == before.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_copy_has_the_edits_and_goes_its_own_way() -> None:
    model = parse(SMALL_NET)
    model.graph.nodes[1].op = "Abs"
    copy = model.copy()
    copy.graph.nodes[0].inputs[1].values[:] = 0
    copy.annotate("key", "value")
    assert [node.op for node in copy.graph.nodes] == ["Add", "Abs"]
    assert np.any(model.graph.nodes[0].inputs[1].values)
    assert model.metadata() == {}


def test_annotating_twice_overwrites() -> None:
    model = parse(SMALL_NET)
    model.annotate("a", "1")
    model.annotate("b", "2")
    model.annotate("a", "3")
    assert model.metadata() == {"a": "3", "b": "2"}
    assert model.to_proto().metadata_props[0].value == "3"


def test_a_model_is_called_by_its_file_or_its_graph() -> None:
    proto = parse(SMALL_NET).proto
    assert Model(proto, path=Path("folder/file.onnx")).name == "file.onnx"
    assert Model(proto).name == "net"
    assert Model(ModelProto()).name == "model"


def test_an_invalid_edit_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    model = parse(SMALL_NET)
    model.graph.nodes[0].op = "Nonsense"
    with pytest.raises(ModelError, match="No Op registered for Nonsense"):
        model.save(path)
    assert path.read_bytes() == b"old"
    with pytest.raises(ModelError, match="net after this: is not a valid ONNX model"):
        model.check("after this")


def test_an_edit_that_makes_a_cycle_is_found() -> None:
    model = parse(SMALL_NET)
    model.proto.graph.value_info.append(helper.make_tensor_value_info("a", 1, [1, 4]))
    first, second = model.graph.nodes
    first.inputs[0] = second.outputs[0]
    with pytest.raises(ModelError, match="topologically sorted"):
        model.save("never.onnx")


def test_the_skeleton_has_all_but_the_large_weights() -> None:
    model = parse(NET)
    for bare in (model.skeleton(), (model.graph, model.skeleton())[1]):
        assert [tensor.name for tensor in bare.graph.initializer] == ["b"]
        assert [info.name for info in bare.graph.input] == ["x", "w", "v"]
        assert bare.ByteSize() < 2_000
        onnx.checker.check_model(bare, full_check=True)


def test_the_skeleton_of_constant_nodes() -> None:
    large, small = (numpy_helper.from_array(np.ones(n, np.float32)) for n in (1000, 4))
    model = parse("net (float[1] x) => (float[1] y) { y = Relu(x) }")
    model.proto.graph.node.extend(
        helper.make_node("Constant", [], [name], value=tensor)
        for name, tensor in (("large", large), ("small", small))
    )
    bare = model.skeleton().graph
    assert [info.name for info in bare.input] == ["x", "large"]
    assert [node.output[0] for node in bare.node] == ["y", "small"]


def test_the_skeleton_keeps_what_is_only_called_constant() -> None:
    model = parse("net (float[1] x) => (float[1] y) { y = Relu(x) }")
    tensor = numpy_helper.from_array(np.ones(1000, np.float32))
    node = helper.make_node("Constant", [], ["large"], domain="my", value=tensor)
    model.proto.graph.node.append(node)
    model.proto.opset_import.add(domain="my", version=1)
    for bare in (model.skeleton(), (model.graph, model.skeleton())[1]):
        assert bare.graph.node[1] == node


# -- external data ----------------------------------------------------------------------------


def test_external_weights_are_read_when_asked_for(
    external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(external.parent.parent)
    model = Model.load(Path("models/net.onnx"))
    assert [node.inputs[1].shape for node in model.graph.nodes] == [[64, 64], [64, 64], [64]]
    monkeypatch.chdir("/")
    assert_same_weights(model, parse(NET))
    assert model.to_proto() == model.proto  # reading changes nothing
    assert all(t.data_location == TensorProto.EXTERNAL for t in model.proto.graph.initializer)


def test_weights_nobody_asks_for_are_not_read(external: Path) -> None:
    model = Model.load(external)
    external.with_name("weights.bin").unlink()
    assert model.graph.nodes
    assert model.to_proto() == model.proto
    with pytest.raises(ModelError, match=r"weight 'w' cannot be read: .*weights\.bin"):
        weights(model)


def test_external_stays_external_in_another_folder(external: Path, tmp_path: Path) -> None:
    target = tmp_path / "other" / "saved.onnx"
    target.parent.mkdir()
    model = Model.load(external)
    model.save(target)
    (data,) = target.parent.glob("*.data")
    assert re.fullmatch(r"saved\.onnx\.[0-9a-f]{12}\.data", data.name)
    assert sorted(f.name for f in target.parent.iterdir()) == ["saved.onnx", data.name]
    for file in external.parent.iterdir():
        file.unlink()  # the saved one stands alone

    saved = Model.load(target)
    assert_same_weights(saved, parse(NET))
    w, v, b = saved.proto.graph.initializer
    assert [{e.key: e.value for e in t.external_data} for t in (w, v)] == [
        {"location": data.name, "offset": "0", "length": str(64 * 64 * 4)},
        {"location": data.name, "offset": str(64 * 64 * 4), "length": str(64 * 64 * 4)},
    ]
    assert b == numpy_helper.from_array(numpy_helper.to_array(b), "b")  # small ones lie inside
    assert np.isfinite(run(target)).all()


def test_offsets_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    text = "n (float[N,300] x) => (float[N,300] y) <float[300] w, float[300] v>"
    save_external(parse(text + "{ p = Add(x, w) y = Add(p, v) }"), path)
    Model.load(path).save(path)
    tensors = Model.load(path).proto.graph.initializer
    offsets = [e.value for t in tensors for e in t.external_data if e.key == "offset"]
    assert offsets == ["0", "4096"]


def test_overwriting_in_place_keeps_every_weight(external: Path) -> None:
    expected = run(external)
    model = Model.load(external)
    model.graph.nodes[2].inputs[1].values[:] += 1
    model.save(external)
    np.testing.assert_allclose(run(external), expected + 1, rtol=1e-5, atol=1e-5)
    again = Model.load(external)
    again.graph.nodes[0].inputs[1].values[:] *= 2
    again.save(external)
    assert_same_weights(Model.load(external), again)
    assert weights(model)  # models that are open still find their weights
    again.save(external)


def test_saving_deletes_nothing(external: Path) -> None:
    """Not even what looks like an older data file of ours: another model may refer to it."""
    own = external.with_name("net.onnx.0123456789ab.data")
    own.write_bytes(b"the user's")
    longer = external.with_name("net.onnx.onnx")
    Model.load(external).save(longer)
    Model.load(longer).save(external)
    backup = external.with_name("backup.onnx")
    backup.write_bytes(external.read_bytes())
    edited = Model.load(external)
    edited.graph.nodes[0].inputs[1].values[:] = 0
    edited.save(external)
    assert own.read_bytes() == b"the user's"
    for path in (longer, backup):
        assert_same_weights(Model.load(path), parse(NET))


def test_saving_the_same_twice_gives_the_same_files(external: Path) -> None:
    target = external.with_name("saved.onnx")
    Model.load(external).save(target)
    first = {file: file.read_bytes() for file in external.parent.iterdir()}
    Model.load(external).save(target)
    assert {file: file.read_bytes() for file in external.parent.iterdir()} == first


def test_typed_and_low_precision_weights_move_out_and_back(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    values = np.arange(4096, dtype=np.float32) / 7
    typed = helper.make_tensor("t", TensorProto.FLOAT, [4096], values)
    assert not typed.raw_data
    half = helper.make_tensor("h", TensorProto.FLOAT16, [4096], values)
    packed = helper.make_tensor("q", TensorProto.INT4, [4095], np.arange(4095) % 15 - 7)
    text = helper.make_tensor("s", TensorProto.STRING, [400], ["some text"] * 400)
    tensors = (typed, half, packed, text)
    outputs = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph([], "g", [], outputs, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pwopt.model, "PROTOBUF_LIMIT", 10_000)
        Model(proto).save(path)
    saved = Model.load(path)
    assert [t.data_location for t in saved.proto.graph.initializer] == [1, 1, 1, 0]
    for before, after in zip(tensors, in_memory(saved).graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(after), numpy_helper.to_array(before))


def test_a_model_beyond_the_limit_moves_its_weights_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwopt.model, "PROTOBUF_LIMIT", 10_000)
    path = tmp_path / "m.onnx"
    model = parse(NET)
    model.save(path)
    assert path.stat().st_size < 2_000
    assert_same_weights(Model.load(path), model)
    path.write_bytes(model.proto.SerializeToString())
    with pytest.raises(ModelError, match="is larger than 2 GB; export it with external data"):
        Model.load(path)


def test_external_data_of_constants_and_subgraphs(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    values = np.arange(1000, dtype=np.float32)
    node = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(values, "v"))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1000])],
        [numpy_helper.from_array(values, "w")],
    )
    choice = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [node, choice],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1000]) for name in "yz"],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, path, save_as_external_data=True, size_threshold=0, convert_attribute=True)
    assert path.stat().st_size < 2_000

    model = Model.load(path)
    constant, branch = model.graph.nodes[0].attrs["value"], model.graph.nodes[1].subgraphs
    for tensor in (constant, *(graph.nodes[0].inputs[0] for graph in branch())):
        np.testing.assert_array_equal(tensor.values, values)
    target = tmp_path / "other.onnx"
    Model.load(path).save(target)
    assert target.stat().st_size < 2_000
    assert in_memory(Model.load(target)).graph.node[0].attribute[0].t.raw_data == values.tobytes()


def test_external_data_of_functions(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    values = np.arange(1000, dtype=np.float32)
    tensor = numpy_helper.from_array(values, "v")
    external_data_helper.set_external_data(tensor, "weights.bin", 0, values.nbytes)
    tensor.ClearField("raw_data")
    model = parse("net (float[1000] x) => (float[1000] y) { y = Relu(x) }").proto
    function = helper.make_function(
        "my",
        "Weight",
        [],
        ["w"],
        [helper.make_node("Constant", [], ["w"], value=tensor)],
        [helper.make_opsetid("", model.opset_import[0].version)],
    )
    model.functions.append(function)
    path.write_bytes(model.SerializeToString())
    assert_load_fails(path, "'weights.bin' with weight 'v' is missing")
    (tmp_path / "weights.bin").write_bytes(values.tobytes())
    (constant,) = in_memory(Model.load(path)).functions[0].node
    assert constant.attribute[0].t.raw_data == values.tobytes()


def redirect(path: Path, **entries: str) -> None:
    """Change where the first weight of a model file lies."""
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(proto.SerializeToString())


def assert_load_fails(path: Path, *reasons: str) -> None:
    with pytest.raises(ModelError) as caught:
        Model.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: "), message
    assert "\n" not in message
    assert len(message) < 400
    for reason in reasons:
        assert reason in message


def test_external_data_that_is_missing(external: Path) -> None:
    external.with_name("weights.bin").unlink()
    assert_load_fails(external, "'weights.bin'", "'w'", "is missing; put it beside the model")


def test_external_data_that_is_too_short(external: Path) -> None:
    data = external.with_name("weights.bin")
    data.write_bytes(data.read_bytes()[:-1])
    assert_load_fails(external, "'weights.bin'", "too short for weight", "copy it again")


@pytest.mark.parametrize("value", ["-1", "many", ""])
def test_external_data_at_no_valid_place(external: Path, value: str) -> None:
    redirect(external, offset=value)
    assert_load_fails(external, "'w' has no valid place in 'weights.bin'")


@pytest.mark.parametrize("place", ["../secret.bin", "sub/../../secret.bin", "ABSOLUTE", "LINK", ""])
def test_external_data_outside_the_folder_is_not_followed(external: Path, place: str) -> None:
    secret = external.parent.parent / "secret.bin"
    secret.write_bytes(bytes(100_000))
    external.with_name("LINK").symlink_to(secret)
    location = str(secret) if place == "ABSOLUTE" else place
    redirect(external, location=location)
    assert_load_fails(external, f"'w' points outside the model's folder ('{location}')")


def test_an_absolute_path_is_not_followed_even_inside(external: Path) -> None:
    redirect(external, location=str(external.with_name("weights.bin")))
    assert_load_fails(external, "points outside the model's folder")


def test_external_data_in_a_folder_below_is_fine(external: Path) -> None:
    below = external.parent / "data"
    below.mkdir()
    (below / "w.bin").write_bytes(external.with_name("weights.bin").read_bytes())
    redirect(external, location="data/w.bin")
    assert_same_weights(Model.load(external), parse(NET))


# -- saving is atomic -------------------------------------------------------------------------


def test_a_killed_save_leaves_the_old_model(external: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pwopt.model import Model\n"
        "model = Model.load(sys.argv[1])\n"
        "model.graph.nodes[0].inputs[1].values[:] = 0\n"
        "os.fsync = lambda _: (print('writing', flush=True), time.sleep(600))\n"
        "model.save(sys.argv[1])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(external)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert_same_weights(Model.load(external), parse(NET))


def test_a_full_disk_leaves_no_trace(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it strikes: in the data file or, that being written, in the model."""
    before = {file: file.read_bytes() for file in external.parent.iterdir()}
    for good in (0, 1, 2, 3):
        syncs = iter([None] * good)

        def full(_: int, syncs=syncs) -> None:  # type: ignore[no-untyped-def]
            if next(syncs, "full"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        model = Model.load(external)
        model.graph.nodes[0].inputs[1].values[:] = good
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            if good < 3:  # data file, its folder (where failing is no harm), model
                with pytest.raises(PwoptError, match="No space left on device") as caught:
                    model.save(external)
                assert "\n" not in str(caught.value)
                assert {f: f.read_bytes() for f in external.parent.iterdir()} == before
            else:
                model.save(external)
                assert_same_weights(Model.load(external), model)


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in [
        (tmp_path / "file" / "m.onnx", "Not a directory"),
        (tmp_path / "no" / "m.onnx", "No such file or directory"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(PwoptError, match=f"^{re.escape(str(path))}: .*{reason}"):
            parse(SMALL_NET).save(path)


# -- bad files --------------------------------------------------------------------------------


def proto(change: Callable[[ModelProto], object]) -> bytes:
    """The small net after some mistake."""
    model = parse(SMALL_NET).proto
    change(model)
    return model.SerializeToString()


def duplicate(model: ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


BAD = {
    "empty": (b"", "is empty; export or download the model again"),
    "text": (b"layers: 3\n" * 9, "is not an ONNX model, or was cut off"),
    "random": (random.Random(0).randbytes(4096), "is not an ONNX model, or was cut off"),
    "zeros": (bytes(1000), "is not an ONNX model, or was cut off"),
    "tensor": (
        numpy_helper.from_array(np.ones(3), "w").SerializeToString(),
        "is not an ONNX model",
    ),
    "bare graph": (parse(SMALL_NET).proto.graph.SerializeToString(), "is not an ONNX model"),
    "no graph": (proto(lambda m: m.ClearField("graph")), "no graph"),
    "no opset": (proto(lambda m: m.ClearField("opset_import")), "no opset"),
    "new opset": (
        proto(lambda m: setattr(m.opset_import[0], "version", 9999)),
        "uses opset 9999, but the installed onnx knows up to",
    ),
    "new ir": (proto(lambda m: setattr(m, "ir_version", 9999)), "ir_version 9999 is higher"),
    "dangling": (
        proto(lambda m: m.graph.node[0].input.__setitem__(0, "nowhere")),
        "input 'nowhere' of node",
    ),
    "cycle": (
        proto(lambda m: m.graph.node[0].input.__setitem__(0, "y")),
        "Nodes in a graph must be topologically sorted, however input 'y'",
    ),
    "unknown operator": (
        proto(lambda m: setattr(m.graph.node[0], "op_type", "Frobnicate")),
        "No Op registered for Frobnicate",
    ),
    "unknown domain": (
        proto(lambda m: setattr(m.graph.node[0], "domain", "my")),
        "No opset import for domain 'my'",
    ),
    "duplicate tensor": (proto(duplicate), "'a' has been used as output names multiple times"),
    "duplicate weight": (
        proto(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
        "w initializer name is not unique",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_so_in_one_line(tmp_path: Path, case: str) -> None:
    data, reason = BAD[case]
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    assert_load_fails(path, reason)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert_load_fails(tmp_path / "no.onnx", "no such file; check the path")
    assert_load_fails(tmp_path, "is a folder; give the .onnx file inside it")
    (tmp_path / "file").touch()
    assert_load_fails(tmp_path / "file" / "m.onnx", "cannot be read (Not a directory)")


def test_what_cannot_be_mapped_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for data in (parse(NET).proto.SerializeToString(), b""):
        writer = threading.Thread(target=pipe.write_bytes, args=[data], daemon=True)
        writer.start()
        if data:
            assert_same_weights(Model.load(pipe), parse(NET))
        else:
            assert_load_fails(pipe, "is empty; export or download the model again")
        writer.join(10)
    with pytest.raises(ModelError, match=r"^/dev/null: is empty"):
        Model.load("/dev/null")


def test_a_loaded_model_lets_go_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    data = parse(NET).proto.SerializeToString()
    path.write_bytes(data)
    model = Model.load(path)
    with path.open("r+b") as file:  # in place: what is mapped would change
        file.write(bytes(len(data)))
    assert_same_weights(model, parse(NET))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


@pytest.mark.parametrize("rest", [b"", b"not a model"])
def test_a_file_that_changes_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(parse(NET).proto.SerializeToString())
    mapping = mmap.mmap

    def late(*args: int, access: int) -> mmap.mmap:
        path.write_bytes(rest)
        return mapping(*args, access=access)

    monkeypatch.setattr(mmap, "mmap", late)
    assert_load_fails(path, "is not an ONNX model" if rest else "is empty")


def test_a_file_system_that_maps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int, access: int) -> mmap.mmap:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    path = tmp_path / "m.onnx"
    path.write_bytes(parse(NET).proto.SerializeToString())
    monkeypatch.setattr(mmap, "mmap", refuse)
    assert_same_weights(Model.load(path), parse(NET))


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = parse(SMALL_NET).proto.SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        assert_load_fails(path, "is not an ONNX model")


def test_damaged_files_raise_nothing_but_model_errors(tmp_path: Path) -> None:
    whole = parse(SMALL_NET).proto.SerializeToString()
    rng = random.Random(0)
    path = tmp_path / "damaged.onnx"
    messages = []
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            model = Model.load(path)
            weights(model)
            model.to_proto()
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_operators_of_other_domains_are_fine(tmp_path: Path) -> None:
    def custom(model: ModelProto) -> None:
        model.graph.node[0].domain = "my"
        model.opset_import.add(domain="my", version=3)

    path = tmp_path / "custom.onnx"
    path.write_bytes(proto(custom))
    assert Model.load(path).graph.nodes[0].domain == "my"


def test_text_that_is_not_utf8_is_refused() -> None:
    text = b"\x02\xff\xfe"
    of_model, of_graph = parse(SMALL_NET).proto, parse(SMALL_NET).proto
    of_model.MergeFromString(b"\x32" + text)
    of_graph.graph.MergeFromString(b"\x52" + text)
    for proto in (of_model, of_graph):
        model = Model(proto)
        with pytest.raises(ModelError, match="doc_string is not UTF-8 text"):
            model.to_proto()
        assert model.graph.nodes
        with pytest.raises(ModelError, match="doc_string is not UTF-8 text"):
            model.to_proto()
