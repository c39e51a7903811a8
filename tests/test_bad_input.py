"""Whatever a user gets wrong: one line that says what and what to do, and no file touched."""

import io
import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto, TensorProto, external_data_helper, helper, numpy_helper

from pwopt.cli import main

CLASSES = 10
WIDEST = 64

GENERATORS = """
import numpy as np

class Readerless: pass

def raises(): raise RuntimeError("out of\\ncheese")
def raises_later():
    yield {"images": np.zeros((1, 3, 16, 16), np.float32)}
    raise KeyError("gone")
def exits(): raise SystemExit(5)
def leaves(): raise SystemExit(0)
def ragged(): return [{"images": [[1], [1, 2]]}]
def ragged_labels(): return [({"images": np.zeros((2, 3, 16, 16), np.float32)}, [[1], [1, 2]])]
def numbered(): return [{1: np.zeros(1), "images": np.zeros((1, 3, 16, 16), np.float32)}]
def number(): return 5
def numbers(): return [1, 2]
def wrong_name(): return [{"pictures": np.zeros((1, 3, 16, 16), np.float32)}]
def wrong_shape(): return [{"images": np.zeros((1, 3, 8, 16), np.float32)}]
def wrong_type(): return [{"images": np.array([["a"]])}]
def no_array(): return [{"images": None}]
def nan(): return [{"images": np.full((1, 3, 16, 16), np.nan, np.float32)}]
def nothing(): return []
not_callable = 3
"""


@dataclass(frozen=True)
class Case:
    """A command line, its exit code, and words that the one line on stderr must hold."""

    line: str
    exit: int
    says: tuple[str, ...]


def case(line: str, exit_code: int, *says: str) -> Case:
    return Case(line, exit_code, says)


# Where a bad model may stand; {} is its name.
MODEL_COMMANDS = (
    "analyze {}",
    "analyze {} --json -o kept",
    "rewrite {} --bottleneck 8",
    "rewrite {} --bottleneck 8 --json -o kept",
    "rewrite {} --pipeline fold-affine -o kept",
    "check {} good.onnx",
    "check good.onnx {}",
)

# name: (made by `world`, in the order of the issue); what the line says besides the name
BAD_MODELS = {
    "missing.onnx": ("no such file", "check the path"),
    "no/folder/missing.onnx": ("no such file", "check the path"),
    "text.onnx/missing.onnx": ("",),
    "empty.onnx": ("empty", "again"),
    "truncated.onnx": ("cut off", "again"),
    "text.onnx": ("not an ONNX model", "again"),
    "random.onnx": ("not an ONNX model",),
    "zeros.onnx": ("not an ONNX model",),
    "image.png": ("not an ONNX model",),
    "folder": ("is a folder", "file inside"),
    "no_graph.onnx": ("no graph",),
    "newer_opset.onnx": ("opset 99", "upgrade onnx"),
    "dangling.onnx": ("nowhere", "export it again"),
    "unknown_operator.onnx": ("Frobnicate",),
    "cycle.onnx": ("topological", "export it again"),
    "external_missing.onnx": ("weights.bin", "is missing", "beside the model"),
    "external_short.onnx": ("short.bin", "too short", "copy it again"),
    "external_parent.onnx": ("outside", "../secret.bin"),
    "external_absolute.onnx": ("outside", "beside the model"),
    "external_link.onnx": ("outside", "beside the model"),
    "external_rubbish.onnx": ("no valid place", "export the model again"),
    "latin1.onnx": ("UTF-8",),
    f"{'long' * 80}.onnx": ("",),
}

# These load; only who reads the weights sees it.
BAD_WEIGHTS = {
    "nan.onnx": ("'wide'", "NaN", "export the model again"),
    "infinite.onnx": ("'wide'", "export the model again"),
    "short_weight.onnx": ("'wide.weight'", "export it again"),
    "wrong_channels.onnx": ("'wide'", "channels"),
}

USAGE = [
    case("nonsense", 2, "nonsense"),
    case("analyze", 2, "MODEL"),
    case("rewrite", 2, "MODEL"),
    case("check good.onnx", 2, "REWRITTEN"),
    case("analyze good.onnx --nonsense", 2, "--nonsense"),
    case("analyze good.onnx --format xml", 2, "--format", "table", "json", "csv"),
    case("analyze good.onnx --threads 0", 2, "--threads"),
    case("analyze good.onnx -o good.onnx", 2, "good.onnx", "another file"),
    case("rewrite good.onnx", 2, "--bottleneck", "--pipeline"),
    case("rewrite good.onnx --bottleneck 8 --pipeline fold-affine", 2, "--pipeline"),
    case("rewrite good.onnx --bottleneck 8 --sides left", 2, "--sides", "input", "both"),
    case("rewrite good.onnx --pipeline fold-affine --sides input -o kept", 2, "sides=SIDES"),
    case("passes nonsense", 2, "nonsense", "bottleneck"),
    case("check good.onnx good.onnx --max-drop -1", 2, "--max-drop"),
    case("check good.onnx good.onnx --data bad_feeds:nan --max-drop nan", 2, "--max-drop nan"),
    case("check good.onnx good.onnx --min-speedup nan", 2, "--min-speedup nan"),
    case("check good.onnx good.onnx --min-speedup inf", 2, "--min-speedup inf"),
    case("check good.onnx good.onnx --max-drop 1", 2, "--max-drop", "--data"),
    case("check good.onnx good.onnx --min-speedup x", 2, "--min-speedup"),
    case("check good.onnx good.onnx --batch 0", 2, "--batch"),
    case("check fixed.onnx fixed.onnx --batch 3", 2, "--batch", "fixed.onnx", "1"),
    case("check good.onnx good.onnx --preprocess unit", 2, "--preprocess", "--data"),
    case("demo text.onnx", 2, "text.onnx"),
    case("demo text.onnx/demo", 1, "text.onnx/demo", "cannot be written"),
    case("demo /proc/demo", 1, "/proc/demo", "cannot be written"),
]

RANKS = [
    case(f"{command} {rank} -o kept", 2, says)
    for command in ("analyze good.onnx --bottleneck", "rewrite good.onnx --bottleneck")
    for rank, says in (
        ("0", "--bottleneck"),
        ("-3", "--bottleneck"),
        ("1.5", "--bottleneck"),
        ("many", "--bottleneck"),
        ("1000", f"the widest has {WIDEST}"),
    )
]

PIPELINES = [
    case(f"rewrite good.onnx -o kept --pipeline '{spec}'", 2, *says)
    for spec, says in {
        "": ("pipeline", "fold-affine"),
        " ": ("pipeline", "fold-affine"),
        ",": ("pipeline", "fold-affine"),
        "fold-affine,": ("pipeline", "fold-affine"),
        "fold-affine bottleneck": ("pipeline", "fold-affine"),
        "frobnicate": ("unknown pass 'frobnicate'", "fold-affine"),
        "fold-affine,Bottleneck{rank=8}": ("unknown pass 'Bottleneck'", "bottleneck"),
        "bottleneck": ("'rank' is missing",),
        "bottleneck{": ("pipeline", "fold-affine"),
        "bottleneck{rank=8": ("pipeline", "fold-affine"),
        "bottleneck{rank}": ("'rank'", "name=value"),
        "bottleneck{rank=}": ("'rank='", "name=value"),
        "bottleneck{rank=8,rank=9}": ("rank", "twice"),
        "bottleneck{rank=8,colour=red}": ("unknown option 'colour'", "min_channels"),
        "bottleneck{rank=eight}": ("rank", "whole number", "eight"),
        "bottleneck{rank=0}": ("rank", "at least 1"),
        "bottleneck{rank=-8}": ("rank", "at least 1"),
        "bottleneck{rank=8,min_channels=0}": ("min_channels", "at least 1"),
        "bottleneck{rank=1000}": ("rank 1000", f"the widest has {WIDEST}"),
        "bottleneck{rank=8,sides=left}": ("sides", "input, output, both"),
        "fold-affine{rank=8}": ("unknown option 'rank'",),
    }.items()
]

SHAPES = [
    case(f"{command} --shape '{shape}'", 2, "--shape", *says)
    for command in (
        "analyze good.onnx -o kept",
        "rewrite good.onnx --bottleneck 8 -o kept",
        "check good.onnx good.onnx",
    )
    for shape, says in {
        "nonsense": ("nonsense", "NAME=1,3,224,224"),
        "": ("NAME=1,3,224,224",),
        "images=": ("NAME=1,3,224,224",),
        "=1,3,16,16": ("NAME=1,3,224,224",),
        "images=1,3,x,16": ("NAME=1,3,224,224",),
        "images=0,3,16,16": ("NAME=1,3,224,224",),
        "images=1,-3,16,16": ("NAME=1,3,224,224",),
        "pictures=1,3,16,16": ("pictures", "images"),
        "images=3,16,16": ("images", "N,3,16,16"),
        "images=1,4,16,16": ("images", "N,3,16,16"),
    }.items()
] + [
    case("analyze open.onnx", 1, "open.onnx", "--shape x=1,3,224,224"),
    case("rewrite open.onnx --bottleneck 8", 1, "open.onnx", "--shape x=1,3,224,224"),
    case("analyze flat.onnx", 1, "flat.onnx", "--shape"),
    case("rewrite flat.onnx --bottleneck 8 -o kept", 1, "flat.onnx", "--shape"),
]

OUTPUTS = (
    [
        case(f"{command} -o '{output}'", 1, output, *says)
        for command in ("analyze good.onnx",)
        for output, says in {
            "text.onnx/out.onnx": ("cannot be written",),
            "no/folder/out.onnx": ("cannot be written",),
        }.items()
    ]
    + [
        case(
            f"rewrite {model} --bottleneck 8 {option} {parent}/out", 2, "There is no folder", parent
        )
        for model in ("good.onnx", "external.onnx", "missing.onnx")
        for option in ("-o", "--json -o")
        for parent in ("text.onnx", "no/folder")
    ]
    + [
        case(f"{command} -o '{output}'", 1, output, *says)
        for command in (
            "analyze good.onnx",
            "rewrite good.onnx --bottleneck 8",
            "rewrite good.onnx --bottleneck 8 --json",
            "rewrite external.onnx --bottleneck 8",
        )
        for output, says in {
            "folder": ("is a folder",),
            "/proc/out.onnx": ("cannot be written",),
            f"{'long' * 80}.onnx": ("",),
        }.items()
    ]
)

DATA = [
    case(f"check good.onnx good.onnx --data {source}", code, source.partition(" ")[0], *says)
    for source, code, says in [
        ("missing.npz", 1, ("no such file", "module:callable")),
        ("empty.onnx", 1, ("numpy.savez",)),
        ("text.onnx", 1, ("numpy.savez",)),
        ("good.onnx", 1, ("numpy.savez",)),
        ("truncated.npz", 1, ("numpy.savez",)),
        ("corrupt.npz", 1, ("numpy.savez",)),
        ("zipped_text.npz", 1, ("numpy.savez",)),
        ("pickled.npz", 1, ("pickled objects are not read",)),
        ("pickled.npy", 1, ("pickled objects are not read",)),
        ("pickle.npz", 1, ("pickled objects are not read",)),
        ("array.npy", 1, ("without a name", "numpy.savez")),
        ("no_arrays.npz", 1, ("nothing", "'images'")),
        ("other_names.npz", 1, ("'pictures'", "'images'")),
        ("no_samples.npz --preprocess unit", 1, ("no samples",)),
        ("wrong_size.npz --preprocess unit", 1, ("[4, 8, 16, 3]", "16, 16")),
        ("wrong_float.npz", 1, ("[4, 3, 8, 16]", "3, 16, 16")),
        ("wrong_rank.npz", 1, ("[3, 16, 16]", "3, 16, 16")),
        ("scalar.npz", 1, ("[]", "3, 16, 16")),
        ("nan.npz", 1, ("NaN", "'images'")),
        ("overflow.npz", 1, ("infinity as float32", "'images'")),
        ("text_array.npz", 1, ("'images'", "float32")),
        ("complex.npz", 1, ("'images'", "float32")),
        ("few_labels.npz --preprocess unit", 1, ("3 labels", "4 ")),
        ("float_labels.npz --preprocess unit", 1, ("labels", "integers")),
        ("one_hot.npz --preprocess unit", 1, ("labels", "integers")),
        ("scalar_label.npz --preprocess unit", 1, ("labels", "integers")),
        ("uint64_labels.npz --preprocess unit", 1, ("18446744073709551615", "too large")),
        ("large_labels.npz --preprocess unit", 1, ("labels", f"0..{CLASSES - 1}")),
        ("negative_labels.npz --preprocess unit", 1, ("labels", f"0..{CLASSES - 1}")),
        ("images.npz", 2, ("8-bit images", "--preprocess")),
        ("array.npz --preprocess unit", 2, ("8-bit images",)),
        ("folder --preprocess unit", 1, ("no images", ".jpg")),
        ("no_pictures --preprocess unit", 1, ("no images", ".jpg")),
        ("broken_jpeg --preprocess unit", 1, ("b.jpg", "remove or replace it")),
        ("cut_jpeg --preprocess unit", 1, ("a.png", "remove or replace it")),
        ("folder_jpeg --preprocess unit", 1, ("no images", ".jpg")),
        ("fifo --preprocess unit", 1, ("no images", ".jpg")),
        ("pictures", 2, ("--preprocess",)),
        ("no_columns --preprocess unit", 1, ("labels.csv", "file,label")),
        ("no_rows --preprocess unit", 1, ("labels.csv", "no images")),
        ("empty_csv --preprocess unit", 1, ("labels.csv", "line 1", "file,label")),
        ("semicolons --preprocess unit", 1, ("labels.csv", "line 1", "file,label")),
        ("huge_label --preprocess unit", 1, ("labels.csv", "line 2", "18 digits")),
        ("binary_csv --preprocess unit", 1, ("labels.csv", "file,label")),
        ("unknown_file --preprocess unit", 1, ("labels.csv", "line 3", "'ghost.png'")),
        ("named_label --preprocess unit", 1, ("labels.csv", "line 2", "class number")),
        ("large_label --preprocess unit", 1, ("labels", f"0..{CLASSES - 1}")),
        ("nosuchmodule:feeds", 1, ("cannot be imported",)),
        ("bad_feeds:nosuch", 1, ("cannot be imported", "nosuch")),
        ("broken_module:feeds", 1, ("cannot be imported", "SyntaxError")),
        ("bad_feeds:not_callable", 1, ("cannot be called",)),
        ("bad_feeds:raises", 1, ("RuntimeError: out of cheese",)),
        ("bad_feeds:raises_later", 1, ("KeyError",)),
        ("bad_feeds:exits", 1, ("SystemExit: 5",)),
        ("bad_feeds:leaves", 1, ("SystemExit: 0",)),
        ("leaving_module:feeds", 1, ("SystemExit: 0",)),
        ("bad_feeds:ragged", 1, ("'images'", "array")),
        ("bad_feeds:ragged_labels", 1, ("labels", "array")),
        ("bad_feeds:numbered", 1, ("'1'", "'images'")),
        ("bad_feeds:nothing --preprocess unit", 2, ("--preprocess unit", "as it is")),
        ("bad_feeds:number", 1, ("int",)),
        ("bad_feeds:numbers", 1, ("int",)),
        ("bad_feeds:wrong_name", 1, ("'pictures'", "'images'")),
        ("bad_feeds:wrong_shape", 1, ("3, 16, 16",)),
        ("bad_feeds:wrong_type", 1, ("'images'", "float32")),
        ("bad_feeds:no_array", 1, ("'images'", "float32")),
        ("bad_feeds:nan", 1, ("NaN",)),
        ("bad_feeds:nothing", 1, ("no samples",)),
        ("a:b:c", 1, ("module:callable",)),
    ]
] + [
    case(f"check good.onnx good.onnx --data images.npz --preprocess {text}", 2, "--preprocess")
    for text in (
        "sepia",
        "scale=x",
        "std=0",
        "scale=1/0",
        "scale=1e999",
        "mean=1:2",
        "order=gbr",
        "mean",
        "''",
    )
]

PAIRS = [
    case("check good.onnx stranger.onnx", 1, "stranger.onnx", "good.onnx", "its own rewrite"),
    case("check stranger.onnx good.onnx", 1, "stranger.onnx", "good.onnx", "its own rewrite"),
    case("check good.onnx classes.onnx", 1, "classes.onnx", "good.onnx", "its own rewrite"),
    case("check good.onnx classes.onnx --data images.npz --preprocess unit", 1, "classes.onnx"),
]

CASES = [
    *(
        case(command.format(shlex.quote(name)), 1, name, *says)
        for name, says in BAD_MODELS.items()
        for command in MODEL_COMMANDS
    ),
    *(
        case(f"{command} {name} --bottleneck 8 -o kept", 1, name, *says)
        for name, says in BAD_WEIGHTS.items()
        for command in ("analyze", "rewrite")
    ),
    *USAGE,
    *RANKS,
    *PIPELINES,
    *SHAPES,
    *OUTPUTS,
    *DATA,
    *PAIRS,
]


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in the folder of `world`, and leave no trace in sys."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield world
    for module in ("bad_feeds", "broken_module", "leaving_module"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(
            case,
            id=case.line.replace("long" * 80, "long…"),
        )
        for case in CASES
    ],
)
def test_one_line_says_what_is_wrong_and_no_file_changes(given: Case, here: Path) -> None:
    before = snapshot(here)
    result = pwopt(given.line)
    assert_refused(result, given.exit)
    line = result.stderr.splitlines()[-1]
    assert [word for word in given.says if word not in line] == []
    assert snapshot(here) == before


def assert_refused(result: Result, exit_code: int) -> None:
    """One line from pwopt, or click's usage with the error in its last line; no result."""
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    if lines[0].startswith("Usage: "):  # click's own
        assert exit_code == 2
        assert lines[-1].startswith("Error: ")
    else:
        assert len(lines) == 1, lines
        assert lines[0].startswith("pwopt: ")
        assert lines[0] == lines[0].strip()


def pwopt(line: str) -> Result:
    return CliRunner().invoke(main, shlex.split(line))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below the folder; the bytes of the regular files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# -- in between: damaged at any byte ----------------------------------------------------------


def test_a_model_cut_off_anywhere_is_refused(world: Path, tmp_path: Path) -> None:
    whole = (world / "fixed.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for size in {*range(40), *range(40, len(whole), len(whole) // 60), *range(-20, 0)}:
        path.write_bytes(whole[:size])
        result = pwopt(f"rewrite {path} --bottleneck 8")
        assert_refused(result, 1)
        assert str(path) in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["cut.onnx"]


@pytest.mark.parametrize("seed", range(150))
def test_damaged_bytes_never_end_in_a_traceback(seed: int, world: Path, tmp_path: Path) -> None:
    data = bytearray((world / "tiny.onnx").read_bytes())
    rng = np.random.default_rng(seed)
    for position in rng.integers(len(data), size=rng.integers(1, 4)):
        data[position] = rng.integers(256)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(data)
    for command in (f"analyze {path}", f"rewrite {path} --bottleneck 2 -o {tmp_path / 'out'}"):
        result = pwopt(command)
        if result.exit_code:
            assert_refused(result, result.exit_code)
            assert result.exit_code in (1, 2)


# -- as a process -----------------------------------------------------------------------------


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pwopt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    "line",
    ["analyze missing.onnx", "rewrite random.onnx --bottleneck 8", "check text.onnx empty.onnx"],
)
def test_a_process_exits_alike(line: str, world: Path) -> None:
    done = process(*line.split(), cwd=world)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"pwopt: {line.split()[1]}: ")


def test_a_closed_pipe_is_no_fault(world: Path) -> None:
    for command in ("analyze good.onnx --json", "analyze good.onnx", "passes bottleneck"):
        done = subprocess.run(
            f"set -o pipefail; {sys.executable} -m pwopt {command} | true",
            shell=True,
            executable="/bin/bash",
            cwd=world,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert "Broken" not in done.stderr


@pytest.mark.parametrize("command", ["analyze", "analyze --json", "rewrite --bottleneck 8"])
def test_closed_and_full_outputs_are_no_fault(command: str, world: Path, tmp_path: Path) -> None:
    (tmp_path / "good.onnx").write_bytes((world / "good.onnx").read_bytes())
    line = f"{sys.executable} -m pwopt {command} good.onnx"
    for end in (">&-", "2>&-", ">&- 2>&-", ">/dev/full"):
        done = subprocess.run(
            f"{line} {end}",
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert (done.returncode != 0) == (end == ">/dev/full"), done.stderr


@pytest.mark.parametrize("command", ["analyze", "rewrite --bottleneck 8"])
def test_a_pipe_or_device_as_output_is_not_replaced(
    command: str, world: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = pwopt(f"{command} {world / 'good.onnx'} -o {pipe}")
    assert_refused(result, 1)
    assert str(pipe) in result.stderr
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]


def test_names_that_the_terminal_cannot_show_are_escaped(world: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xc3\xa9.onnx"
    Path(os.fsdecode(path)).write_bytes((world / "good.onnx").read_bytes())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for command in ("analyze", "analyze --json", "rewrite --bottleneck 8"):
        done = subprocess.run(
            [sys.executable, "-m", "pwopt", *command.split(), path],
            capture_output=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_rewrite_leaves_no_file(
    number: signal.Signals, world: Path, tmp_path: Path
) -> None:
    """The signal comes while the temporary file is open: the worst moment."""
    script = tmp_path / "slow_disk.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pwopt.cli import main\n"
        # Shells start background jobs, and so perhaps this test, with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(file):\n"
        "    print('now', flush=True)\n"
        "    time.sleep(60)\n"
        "os.fsync = wait\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.onnx").write_bytes(b"kept")
    options = ["--bottleneck", "8", "-o", out / "kept.onnx"]
    running = subprocess.Popen(
        [sys.executable, script, "rewrite", world / "good.onnx", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == "now\n"
        running.send_signal(number)
        stderr = running.stderr.read()
    assert running.returncode != 0
    assert "Traceback" not in stderr
    assert snapshot(out) == {"kept.onnx": b"kept"}


# -- odd, but right ---------------------------------------------------------------------------


def test_a_model_may_come_through_a_pipe(world: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = (world / "good.onnx").read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=[data], daemon=True)
    writer.start()
    result = pwopt(f"rewrite {pipe} --bottleneck 8 -o {tmp_path / 'out.onnx'}")
    writer.join(10)
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_dev_null_is_an_empty_model() -> None:
    result = pwopt("analyze /dev/null")
    assert_refused(result, 1)
    assert "/dev/null: is empty" in result.stderr


def test_the_original_is_not_overwritten(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((world / "good.onnx").read_bytes())
    (tmp_path / "link.onnx").symlink_to(path)
    before = snapshot(tmp_path)
    for output in ("model.onnx", "link.onnx"):
        result = pwopt(f"rewrite {path} --bottleneck 8 -o {tmp_path / output}")
        assert_refused(result, 2)
        assert "is the model itself" in result.stderr
    assert snapshot(tmp_path) == before


def test_a_model_from_a_pipe_needs_a_name_for_the_result(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = pwopt(f"rewrite {pipe} --bottleneck 8")
    assert_refused(result, 2)
    assert "-o" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_as_output_stays_a_link(world: Path, tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    result = pwopt(f"rewrite {world / 'good.onnx'} --bottleneck 8 -o {tmp_path / 'link.onnx'}")
    assert result.exit_code == 0
    assert (tmp_path / "link.onnx").is_symlink()
    onnx.checker.check_model(tmp_path / "real.onnx")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", "model.pwopt.onnx"),
        ("model.v2", "model.v2.pwopt.onnx"),
        ("réseau profond №1.onnx", "réseau profond №1.pwopt.onnx"),
        ("[red]x[bold].onnx", "[red]x[bold].pwopt.onnx"),
        ("-dash.onnx", "-dash.pwopt.onnx"),
        ("a;b 'c' $d.onnx", "a;b 'c' $d.pwopt.onnx"),
    ],
)
def test_odd_file_names(
    name: str, expected: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes((world / "good.onnx").read_bytes())
    analyzed = CliRunner().invoke(main, ["analyze", "--", name])
    assert analyzed.exit_code == 0
    assert name in analyzed.stdout
    result = CliRunner().invoke(main, ["rewrite", "--bottleneck", "8", "--", name])
    assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.iterdir()} == {name, expected}
    assert f"Wrote {expected}" in result.output
    # The hint can be pasted into a shell.
    hint = next(line for line in result.output.splitlines() if line.startswith("Next: "))
    words = shlex.split(hint.removeprefix("Next: "))
    assert [word for word in words if word != "--"] == ["pwopt", "check", name, expected]


def test_brackets_in_tensor_names_are_printed_as_they_are(tmp_path: Path) -> None:
    name = "[bold]wide[/b] :cat: [/x]"
    proto = network(rename={"wide": name})
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    for line in (
        f"analyze {path}",
        f"analyze {path} --json",
        f"rewrite {path} --bottleneck 8",
        f"rewrite {path} --bottleneck 8 --json",
    ):
        result = pwopt(line)
        assert result.exit_code == 0, result.output
        assert name in result.stdout


# -- the files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a good model, and everything that can be wrong."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "kept").write_bytes(b"a file that was here before")
    (folder / "folder").mkdir()
    (folder / "bad_feeds.py").write_text(GENERATORS)
    (folder / "broken_module.py").write_text("def feeds(:\n")
    (folder / "leaving_module.py").write_text("raise SystemExit(0)\n")
    make_models(folder)
    make_arrays(folder)
    make_pictures(folder)
    return folder


def network(
    *,
    batch: int | str = "N",
    channels: int | str = 3,
    size: int | str = 16,
    classes: int = CLASSES,
    width: int = 32,
    x: str = "images",
    rename: dict[str, str] | None = None,
) -> ModelProto:
    """stem 3×3, wide 3×3 (the one that can be split), head."""
    rng = np.random.default_rng(0)
    wide = (rename or {}).get("wide", "wide")
    weights = {
        "stem.weight": rng.standard_normal((width, 3, 3, 3)),
        "wide.weight": rng.standard_normal((2 * width, width, 3, 3)) / 17,
        "head.weight": rng.standard_normal((2 * width, classes)),
    }
    nodes = [
        helper.make_node("Conv", [x, "stem.weight"], ["stem"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["stem"], ["relu"], "relu"),
        helper.make_node("Conv", ["relu", "wide.weight"], [wide], wide, pads=[1] * 4),
        helper.make_node("GlobalAveragePool", [wide], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "head.weight"], ["scores"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [batch, channels, size, size])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_models(folder: Path) -> None:
    def save(name: str, proto: ModelProto) -> None:
        (folder / name).write_bytes(proto.SerializeToString())

    save("good.onnx", network())
    save("fixed.onnx", network(batch=1))
    save("tiny.onnx", network(batch=1, size=5, width=4))
    save("stranger.onnx", network(x="pictures"))
    save("classes.onnx", network(classes=7))
    save("open.onnx", network(x="x", channels="C", size="S"))
    (folder / "latin1.onnx").write_bytes(
        network().SerializeToString().replace(b"wide.weight", b"w\xefde.weight")
    )
    external("external.onnx", folder, "external.bin").write_bytes(bytes(network_bytes()))

    whole = (folder / "good.onnx").read_bytes()
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("Lorem ipsum dolor sit amet, consectetur.\n" * 20)
    (folder / "random.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "zeros.onnx").write_bytes(bytes(5000))
    save("no_graph.onnx", ModelProto(ir_version=8))

    proto = network()
    proto.opset_import[0].version = 99
    save("newer_opset.onnx", proto)
    proto = network()
    proto.graph.node[1].input[0] = "nowhere"
    save("dangling.onnx", proto)
    proto = network()
    proto.graph.node[1].op_type = "Frobnicate"
    save("unknown_operator.onnx", proto)
    proto = network()
    proto.graph.node[0].input[0] = "pool"
    save("cycle.onnx", proto)
    for name, value in (("nan.onnx", np.nan), ("infinite.onnx", np.inf)):
        proto = network()
        weight = numpy_helper.to_array(proto.graph.initializer[1]).copy()
        weight[:, 2, 1, 0] = value
        proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "wide.weight"))
        save(name, proto)
    proto = network()
    proto.graph.initializer[1].raw_data = proto.graph.initializer[1].raw_data[:-4]
    save("short_weight.onnx", proto)
    proto = network()  # onnx's shape inference does not mind
    weight = np.ones((2 * 32, 2 * 32, 3, 3), np.float32)
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "wide.weight"))
    save("wrong_channels.onnx", proto)
    # The 224 pixels that are assumed leave another number of features than the head takes.
    proto = network(size="S")
    del proto.graph.node[3]
    proto.graph.node[3].input[0] = "wide"
    save("flat.onnx", proto)

    secret = folder.parent / "secret.bin"
    secret.write_bytes(bytes(network_bytes()))
    (folder / "link.bin").symlink_to(secret)
    external("external_missing.onnx", folder, "weights.bin")
    external("external_short.onnx", folder, "short.bin").write_bytes(b"too short")
    external("external_parent.onnx", folder, "../secret.bin")
    external("external_absolute.onnx", folder, str(secret))
    external("external_link.onnx", folder, "link.bin")
    external("external_rubbish.onnx", folder, "external.bin", offset="first")


def network_bytes() -> int:
    return network().ByteSize()


def external(name: str, folder: Path, location: str, offset: str | None = None) -> Path:
    """Write the network with its wide weight in a file, which is not written but returned."""
    proto = network()
    tensor = proto.graph.initializer[1]
    external_data_helper.set_external_data(tensor, location, 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    if offset is not None:
        next(entry for entry in tensor.external_data if entry.key == "offset").value = offset
    (folder / name).write_bytes(proto.SerializeToString())
    return folder / location


def make_arrays(folder: Path) -> None:
    images = np.zeros((4, 16, 16, 3), np.uint8)
    floats = np.zeros((4, 3, 16, 16), np.float32)
    labels = np.arange(4)

    def save(name: str, **arrays: object) -> None:
        np.savez(folder / name, **arrays)  # type: ignore[arg-type]

    save("images.npz", images=images)
    save("array.npz", images=floats)
    save("no_arrays.npz")
    save("other_names.npz", pictures=images, labels=labels)
    save("no_samples.npz", images=images[:0])
    save("wrong_size.npz", images=images[:, :8])
    save("wrong_float.npz", images=floats[:, :, :8])
    save("wrong_rank.npz", images=floats[0])
    save("scalar.npz", images=np.float32(1))
    save("nan.npz", images=np.full_like(floats, np.nan))
    save("overflow.npz", images=np.full(floats.shape, 1e300))
    save("text_array.npz", images=np.full((4, 3, 16, 16), "x"))
    save("complex.npz", images=floats + 1j)
    save("few_labels.npz", images=images, labels=labels[:3])
    save("float_labels.npz", images=images, labels=labels / 2)
    save("one_hot.npz", images=images, labels=np.eye(4, CLASSES, dtype=int))
    save("scalar_label.npz", images=images, labels=np.int64(3))
    save("uint64_labels.npz", images=images, labels=np.full(4, 2**64 - 1, np.uint64))
    save("large_labels.npz", images=images, labels=labels + CLASSES)
    save("negative_labels.npz", images=images, labels=labels - 1)
    save("pickled.npz", images=np.array([{}, None], object))
    np.save(folder / "pickled.npy", np.array([{}, None], object))
    np.save(folder / "array.npy", floats)
    (folder / "pickle.npz").write_bytes(pickle.dumps({"images": images}))

    whole = (folder / "images.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (folder / "corrupt.npz").write_bytes(whole[:middle] + b"rubbish" + whole[middle + 7 :])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", "not an array")
    (folder / "zipped_text.npz").write_bytes(buffer.getvalue())


def make_pictures(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs the extra 'images'")
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "png")
    png = buffer.getvalue()
    (folder / "image.png").write_bytes(png)

    def make(name: str, files: dict[str, bytes], labels: bytes | None = None) -> None:
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
        if labels is not None:
            (folder / name / "labels.csv").write_bytes(labels)

    make("pictures", {"a.png": png})
    make("no_pictures", {"readme.txt": b"none here", "model.onnx": b""})
    make("broken_jpeg", {"a.png": png, "b.jpg": b"\xff\xd8 no jpeg"})
    make("cut_jpeg", {"a.png": png[: len(png) // 2]})
    make("folder_jpeg", {})
    (folder / "folder_jpeg" / "a.jpg").mkdir()
    make("fifo", {})
    os.mkfifo(folder / "fifo" / "a.jpg")
    make("semicolons", {"a.png": png}, b"file;label\na.png;1\n")
    make("huge_label", {"a.png": png}, b"file,label\na.png," + b"9" * 24 + b"\n")
    make("no_columns", {"a.png": png}, b"name,class\na.png,1\n")
    make("no_rows", {"a.png": png}, b"file,label\n")
    make("empty_csv", {"a.png": png}, b"")
    make("binary_csv", {"a.png": png}, b"file,label\n\xff\xfe\x00,1\n")
    make("unknown_file", {"a.png": png}, b"file,label\na.png,1\nghost.png,2\n")
    make("named_label", {"a.png": png}, b"file,label\na.png,cat\n")
    make("large_label", {"a.png": png}, b"file,label\na.png,10\n")
