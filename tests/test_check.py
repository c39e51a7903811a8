import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers import ASSETS, needs_assets, parse
from onnx import parser
from rich.console import Console

from pwopt.analysis import Size
from pwopt.checking import Cost, Verdict, check
from pwopt.cli import main
from pwopt.comparing import compare_hits
from pwopt.errors import DataError, ModelError, SpecError
from pwopt.model import Model
from pwopt.report.check import table


def model(body: str, signature: str = "(float[N, 12] x) => (float[N, 12] y)") -> Model:
    return Model(
        parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\ng {signature} {{ {body} }}')
    )


def constant(name: str, *values: float) -> str:
    return f"{name} = Constant <value_floats = [{', '.join(str(float(v)) for v in values)}]> ()"


SAME = model("y = Identity (x)")
LOUDER = model(f"{constant('k', 1.1)} y = Mul (x, k)")


def save(folder: Path, one: Model, name: str) -> str:
    path = folder / name
    onnx.save(one.proto, path)
    return str(path)


# -- equivalence ------------------------------------------------------------------------------


def test_a_model_equals_itself() -> None:
    verdict = check(LOUDER, LOUDER.copy())
    assert verdict.equivalence.max_abs == 0
    assert verdict.equivalence.max_rel == 0
    assert verdict.equivalence.cosine == 1
    assert verdict.equivalence.snr_db is None
    assert verdict.passed
    assert verdict.data.random
    assert verdict.data.assumed == "N=1"
    assert (verdict.accuracy, verdict.agreement) == (None, None)


def test_a_scaled_output_has_the_measures_its_definition_gives() -> None:
    x = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    verdict = check(SAME, LOUDER, data=lambda: [{"x": x[:20]}, {"x": x[20:]}])
    equivalence = verdict.equivalence
    assert equivalence.max_abs == pytest.approx(0.1 * np.abs(x).max(), rel=1e-5)
    assert equivalence.max_rel == pytest.approx(0.1, rel=1e-5)
    assert equivalence.cosine == pytest.approx(1)
    assert equivalence.snr_db == pytest.approx(20, rel=1e-5)
    assert verdict.agreement == 1
    assert verdict.data.samples == 50


def test_the_worst_output_counts_and_types_may_differ() -> None:
    signature = "(float[N, 4] x, int64[N] i, bool b) => (float[N, 4] y, int64[N] j, bool c)"
    one = model(f"{constant('k', 1)} y = Mul (x, k) j = Identity (i) c = Identity (b)", signature)
    two = model(f"{constant('k', 1)} y = Mul (x, k) j = Add (i, i) c = Not (b)", signature)
    feeds = {"x": np.ones((2, 4)), "i": np.array([3, 5]), "b": np.array(True)}
    equivalence = check(one, two, data=lambda: [feeds]).equivalence
    assert equivalence.max_abs == 5
    assert equivalence.max_rel == 1
    assert equivalence.cosine == 0
    assert equivalence.snr_db == pytest.approx(0)


def test_values_that_became_nan_fail_without_a_bound() -> None:
    x = np.ones((3, 12), np.float32)
    x[0, :2] = -1
    log, root = model("y = Log (x)"), model("a = Sqrt (x) y = Log (a)")
    alike = check(log, log, data=lambda: [{"x": x}])
    assert alike.passed
    assert (alike.equivalence.nonfinite, alike.equivalence.nonfinite_both) == (0, 2)
    assert alike.equivalence.compared == 34
    assert "equal where both are finite; 2 values are NaN or infinite in both" in render(alike)
    bad = check(SAME, root, data=lambda: [{"x": x}])
    assert bad.equivalence.nonfinite == 2
    assert np.isfinite(bad.equivalence.max_abs)
    assert not bad.passed
    assert "2 output values are NaN" in bad.reasons[0]


def test_nothing_finite_to_compare_fails() -> None:
    log = model("y = Log (x)")
    verdict = check(log, log, data=lambda: [{"x": np.full((3, 12), -1)}])
    assert verdict.reasons == ("no output value is finite in both g and g: nothing was compared",)
    text = render(verdict)
    assert "outputs are equal" not in text
    assert "36 values are NaN or infinite in both" in text


def test_an_output_of_zeros_gives_finite_measures() -> None:
    zero = model("y = Sub (x, x)")
    equivalence = check(zero, SAME).equivalence
    assert np.isfinite([equivalence.max_rel, equivalence.cosine, equivalence.snr_db or 0]).all()
    assert equivalence.cosine == 0


# -- accuracy ---------------------------------------------------------------------------------


def shifted(samples: int = 40) -> tuple[Model, dict[str, np.ndarray]]:
    """A rewrite that takes class 0 for 1, and samples that are right of themselves."""
    gather = model(
        "i = Constant <value_ints = [1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]> () "
        "y = Gather <axis = 1> (x, i)"
    )
    labels = np.arange(samples) % 4
    scores = np.eye(12)[labels] + 0.01 * np.arange(12)
    labels[3] = 0  # the last of its sample's scores: right for neither, in no first five
    return gather, {"x": scores, "labels": labels}


def test_accuracy_agreement_and_their_bounds(tmp_path: Path) -> None:
    gather, arrays = shifted()
    np.savez(tmp_path / "d.npz", **arrays)
    verdict = check(SAME, gather, data=tmp_path / "d.npz", max_drop=50)
    accuracy = verdict.accuracy
    assert accuracy is not None
    assert accuracy.metric == "top-1"
    assert accuracy.samples == 40
    assert accuracy.original == pytest.approx(100 * 39 / 40)
    assert accuracy.rewritten == pytest.approx(100 * 19 / 40)
    assert accuracy.drop_points == pytest.approx(50)
    low, high = accuracy.drop_ci95
    assert 30 < low < 50 < high < 70
    assert verdict.top5 is not None
    # swapped scores: the label's own 0.01 or 0.00 is never among the first five
    assert verdict.top5.original == pytest.approx(100 * 39 / 40)
    assert verdict.top5.rewritten == pytest.approx(100 * 19 / 40)
    assert verdict.agreement == 0.5
    assert verdict.passed
    failed = check(SAME, gather, data=tmp_path / "d.npz", max_drop=49)
    assert not failed.passed
    assert failed.reasons == ("top-1 fell by 50.00 points; at most 49 were allowed",)


def test_without_labels_the_bound_is_on_agreement() -> None:
    gather, arrays = shifted()
    feeds = {"x": arrays["x"]}
    verdict = check(SAME, gather, data=lambda: [feeds], max_drop=10)
    assert verdict.accuracy is None
    assert verdict.agreement == 0.5
    assert verdict.reasons == ("agreement fell by 50.00 points; at most 10 were allowed",)


def test_filled_up_rows_of_a_fixed_batch_do_not_count(tmp_path: Path) -> None:
    signature = "(float[8, 12] x) => (float[8, 12] y)"
    one, two = model("y = Identity (x)", signature), model("y = Neg (x)", signature)
    arrays = shifted(11)[1]
    np.savez(tmp_path / "d.npz", **arrays)
    verdict = check(one, two, data=tmp_path / "d.npz")
    assert verdict.data.samples == 11
    assert verdict.accuracy is not None
    assert verdict.accuracy.samples == 11
    assert verdict.accuracy.original == pytest.approx(100 * 10 / 11)
    assert verdict.latency.batch == 8
    with pytest.raises(SpecError, match="--batch 2: g takes batches of 8 only"):
        check(one, two, batch=2)


def test_scores_may_have_trailing_axes_and_few_classes_have_no_top5() -> None:
    signature = "(float[N, 4, 1, 1] x) => (float[N, 4, 1, 1] y)"
    one = model("y = Identity (x)", signature)
    feeds = {"x": np.eye(4)[..., None, None]}
    verdict = check(one, one, data=lambda: [(feeds, [0, 1, 2, 0])])
    assert verdict.accuracy is not None
    assert verdict.accuracy.original == 75
    assert verdict.top5 is None


def test_paired_bootstrap_agrees_with_resampling_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    original, rewritten = rng.random(300) < 0.9, rng.random(300) < 0.85
    result = compare_hits("top-1", original, rewritten)
    rows = rng.integers(300, size=(10_000, 300))
    drops = 100 * (original[rows].mean(axis=1) - rewritten[rows].mean(axis=1))
    assert result.drop_ci95 == pytest.approx(np.percentile(drops, [2.5, 97.5]), abs=0.4)
    assert result.drop_points == pytest.approx(100 * (original.mean() - rewritten.mean()))
    assert compare_hits("top-1", original, rewritten) == result


@pytest.mark.parametrize("label", [12, -1])
def test_labels_beyond_the_classes(label: int) -> None:
    feeds = {"x": np.ones((2, 12))}
    with pytest.raises(DataError, match=r"the model's classes are 0\.\.11"):
        check(SAME, SAME, data=lambda: [(feeds, [3, label])])


def test_labels_or_bounds_without_class_scores() -> None:
    picture = model("y = Identity (x)", "(float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y)")
    feeds = {"x": np.ones((2, 1, 4, 4))}
    assert check(picture, picture, data=lambda: [feeds]).agreement is None
    with pytest.raises(DataError, match="no output of g is class scores"):
        check(picture, picture, data=lambda: [(feeds, [0, 1])])
    with pytest.raises(DataError, match="--max-drop: no labels"):
        check(picture, picture, data=lambda: [feeds], max_drop=1)


# -- latency and size -------------------------------------------------------------------------


def test_latency_is_measured_as_asked() -> None:
    latency = check(SAME, LOUDER, threads=2, batch=3).latency
    assert (latency.threads, latency.batch) == (2, 3)
    assert latency.speedup == pytest.approx(latency.original_ms / latency.rewritten_ms)
    assert latency.speedup_ci95[0] <= latency.speedup <= latency.speedup_ci95[1]
    assert check(SAME, SAME, shapes={"x": (5, 12)}).latency.batch == 5
    fails = check(SAME, SAME, min_speedup=1e6)
    assert not fails.passed
    assert "at least 1e+06 was wanted" in fails.reasons[0]


def test_size_is_that_of_the_files_with_external_weights(tmp_path: Path) -> None:
    proto = model("y = MatMul (x, w)").proto
    weights = np.random.default_rng(0).random((12, 12)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    inside = tmp_path / "inside.onnx"
    onnx.save(proto, inside)
    outside = tmp_path / "outside.onnx"
    onnx.save(proto, outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    size = check(inside, outside).size
    assert size.original_bytes == inside.stat().st_size
    assert size.rewritten_bytes == outside.stat().st_size + 12 * 12 * 4
    assert check(Model.load(inside), Model.load(outside)).size == size


def test_cost_is_that_of_one_sample_of_the_data() -> None:
    one = parse("g (float[N,T,12] x) => (float[N,T,8] y) <float[12,8] w> { y = MatMul(x, w) }")
    two = parse(
        """g (float[N,T,12] x) => (float[N,T,8] y) <float[12,2] v, float[2,8] w>
        { a = MatMul(x, v) y = MatMul(a, w) }"""
    )
    cost = check(one, two, data=lambda: [{"x": np.ones((3, 5, 12))}], batch=2).cost
    assert cost is not None
    assert (cost.original.params, cost.original.macs) == (96, 5 * 96)
    assert (cost.rewritten.params, cost.rewritten.macs) == (40, 5 * 40)


def test_cost_is_for_the_batch_that_the_model_demands() -> None:
    four = parse("g (float[4,12] x) => (float[4,8] y) <float[12,8] w> { y = MatMul(x, w) }")
    cost = check(four, four).cost
    assert cost is not None
    assert cost.original.macs == 4 * 96


def test_no_cost_where_shapes_cannot_be_inferred() -> None:
    square = model("y = Relu (x)", "(float[N, N] x) => (float[N, N] y)")  # not of one row
    assert check(square, square, data=lambda: [{"x": np.ones((3, 3))}]).cost is None


# -- wrong use --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (model("y = Identity (z)", "(float[N, 12] z) => (float[N, 12] y)"), "its inputs"),
        (model("y = Identity (x)", "(float[3, 12] x) => (float[3, 12] y)"), "its inputs"),
        (model("z = Identity (x)", "(float[N, 12] x) => (float[N, 12] z)"), "its outputs"),
        (model("y = Cast <to = 11> (x)", "(float[N, 12] x) => (double[N, 12] y)"), "its outputs"),
        (
            model("y = Concat <axis = 1> (x, x)", "(float[N, 12] x) => (float[N, 24] y)"),
            "its output 'y' has shape",
        ),
    ],
)
def test_models_that_do_not_match(other: Model, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        check(SAME, other)
    assert "\n" not in str(error.value)


def test_options_that_need_data() -> None:
    with pytest.raises(SpecError, match="add --data"):
        check(SAME, SAME, max_drop=1)
    with pytest.raises(SpecError, match="add --data"):
        check(SAME, SAME, preprocess="unit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "--threads 0"),
        ({"batch": 0}, "--batch 0"),
        ({"max_drop": float("nan")}, "--max-drop nan"),
        ({"max_drop": -1}, "--max-drop -1"),
        ({"min_speedup": float("nan")}, "--min-speedup nan"),
        ({"min_speedup": float("inf")}, "--min-speedup inf"),
        ({"min_speedup": -1}, "--min-speedup -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check(SAME, SAME, **{"data": lambda: [{"x": np.ones((2, 12))}], **options})


def test_models_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    other = model("z = Identity (x)", "(float[N, 12] x) => (float[N, 12] z)")
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    one, two = save(tmp_path / "a", SAME, "m.onnx"), save(tmp_path / "b", LOUDER, "m.onnx")
    verdict = check(one, two)
    assert (verdict.original, verdict.rewritten) == (one, two)
    stranger = save(tmp_path / "c", other, "m.onnx")
    with pytest.raises(ModelError) as error:
        check(one, stranger)
    assert one in str(error.value)
    assert str(error.value).startswith(stranger)
    assert check(one, save(tmp_path, SAME, "n.onnx")).original == "m.onnx"


# -- command line and report ------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["check", *arguments])


def test_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    gather, arrays = shifted()
    np.savez(tmp_path / "d.npz", **arrays)
    one, two = save(tmp_path, SAME, "a.onnx"), save(tmp_path, gather, "b.onnx")
    result = invoke(one, two, "--data", str(tmp_path / "d.npz"), "--json")
    assert result.exit_code == 0
    verdict = json.loads(result.stdout)
    assert verdict["schema"] == 1
    assert verdict["equivalence"].keys() >= {"max_abs", "max_rel", "cosine", "snr_db"}
    accuracy = {"metric", "samples", "original", "rewritten", "drop_points", "drop_ci95"}
    assert verdict["accuracy"].keys() == verdict["top5"].keys() == accuracy
    assert verdict["latency"].keys() == {
        "threads", "batch", "original_ms", "rewritten_ms", "speedup", "speedup_ci95"
    }  # fmt: skip
    assert verdict["size"].keys() == {"original_bytes", "rewritten_bytes"}
    assert verdict["cost"]["original"].keys() >= {"params", "macs"}
    assert verdict["agreement"] == 0.5
    assert verdict["passed"] is True
    assert result.stderr == ""


def test_random_inputs_are_told_and_progress_is_silent_off_a_terminal(tmp_path: Path) -> None:
    one = save(tmp_path, SAME, "a.onnx")
    result = invoke(one, one)
    assert result.exit_code == 0
    assert "this checks numbers, not accuracy" in result.stdout
    assert result.stderr == ""
    assert json.loads(invoke(one, one, "--json").stdout)["data"]["random"] is True


def test_a_bound_that_is_not_met_prints_the_verdict_and_exits_with_3(tmp_path: Path) -> None:
    one = save(tmp_path, SAME, "a.onnx")
    result = invoke(one, one, "--min-speedup", "1000")
    assert result.exit_code == 3
    assert "outputs are equal" in result.stdout
    assert "failed: runs" in result.stdout
    result = invoke(one, one, "--min-speedup", "1000", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere.onnx", "{one}"), 1, "nowhere.onnx"),
        (("{one}", "{one}", "--data", "nowhere.npz"), 1, "nowhere.npz"),
        (("{one}", "{one}", "--max-drop", "1"), 2, "--data"),
        (("{one}", "{one}", "--shape", "x"), 2, "NAME=1,3,224,224"),
        (("{one}", "{one}", "--shape", "x=1,a"), 2, "NAME=1,3,224,224"),
        (("{one}", "{one}", "--shape", "z=1,12"), 2, "no input 'z'"),
        (("{one}", "{one}", "--threads", "0"), 2, "--threads"),
        (("{one}", "{one}", "--max-drop", "-1"), 2, "--max-drop"),
    ],
)
def test_wrong_use_is_told_in_a_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    one = save(tmp_path, SAME, "a.onnx")
    result = invoke(*(argument.format(one=one) for argument in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def render(verdict: Verdict) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(table(verdict))
    return capture.get()


def test_table_tells_what_changed(tmp_path: Path) -> None:
    gather, arrays = shifted()
    np.savez(tmp_path / "d.npz", **arrays)
    verdict = check(SAME, gather, data=tmp_path / "d.npz")
    text = render(verdict)
    assert "97.50 %" in text
    assert "−50.00 points [" in text
    assert "same class for 50.00 %" in text
    assert "1 thread, batch 1" in text
    assert "\x1b" not in text


def test_table_gives_large_numbers_in_three_digits_and_as_ratios() -> None:
    before = Size(params=14_984_522, macs=313_463_808, weight_bytes=0, nodes=0)
    after = Size(params=5_800_000, macs=122_500_000, weight_bytes=0, nodes=0)
    verdict = check(SAME, SAME)
    lines = {
        line.split()[0]: " ".join(line.split()[1:])
        for line in render(replace(verdict, cost=Cost(before, after))).splitlines()
    }
    assert lines["parameters"] == "15.0 M 5.80 M 2.58× fewer"
    assert lines["MACs"] == "313 M 122 M 2.56× fewer"
    more = render(replace(verdict, cost=Cost(after, before)))
    assert "2.56× more" in more
    assert "the same" in more  # the file size
    assert "MACs" not in render(replace(verdict, cost=None))
    unknown: Any = replace(before, macs=None)
    assert "MACs ? 122 M ?" in " ".join(render(replace(verdict, cost=Cost(unknown, after))).split())


def test_table_is_piped_without_trailing_blanks_or_hyphens_for_minus(tmp_path: Path) -> None:
    one, two = save(tmp_path, SAME, "a.onnx"), save(tmp_path, model("y = Neg (x)"), "b.onnx")
    text = invoke(one, two).stdout
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert "SNR −6.0 dB, cosine −1.000000" in text


def test_random_inputs_are_called_no_measure_of_accuracy() -> None:
    assert "this checks numbers, not accuracy" in render(check(SAME, SAME))


# -- a real network ---------------------------------------------------------------------------


@needs_assets
def test_reference_accuracy_of_a_real_network(tmp_path: Path) -> None:
    path = ASSETS / "models" / "resnet56_cifar10.onnx"
    with np.load(ASSETS / "data" / "cifar10_val.npz") as arrays:
        np.savez(tmp_path / "d.npz", images=arrays["images"][:500], labels=arrays["labels"][:500])
    verdict = check(path, path, data=tmp_path / "d.npz", preprocess="unit", max_drop=0)
    assert verdict.accuracy is not None
    assert verdict.accuracy.original > 90
    assert verdict.accuracy.drop_points == 0
    assert verdict.agreement == 1
    assert verdict.passed
