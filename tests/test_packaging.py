"""What is in the wheel and the sdist, and what importing pwopt costs."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import REPOSITORY

PACKAGES = {
    "pwopt.passes": REPOSITORY / "passes",
    "pwopt.models": REPOSITORY / "models",
    "pwopt": REPOSITORY / "pwopt",
}

HEAVY = {
    "numpy",
    "onnx",
    "onnxruntime",
    "onnx_graphsurgeon",
    "rich",
    "PIL",
    "highspy",
    "matplotlib",
    "scipy",
    "torch",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both from a copy, so that nothing lands in the tree; the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a checkout of git: which files belong to the project is not known")
    source = folder / "source"
    for name in listed.stdout.decode().split("\0"):
        file = REPOSITORY / name
        if not name or not file.exists():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            target.symlink_to(file.readlink())
        else:
            target.write_bytes(file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def modules() -> set[str]:
    """Every module of the tree, as the wheel should hold it."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*.py")
        if package != "pwopt" or not {"passes", "models"} & {*file.relative_to(folder).parts}
    }


def test_the_wheel_holds_every_module_and_nothing_else(wheel: set[str]) -> None:
    python = {name for name in wheel if name.endswith(".py")}
    assert python == modules()
    assert {name.split("/")[0].partition("-")[0] for name in wheel} == {"pwopt"}
    assert not [name for name in wheel if "test" in name]


def test_the_wheel_holds_what_the_demo_needs(wheel: set[str]) -> None:
    demo = {name for name in wheel if name.startswith("pwopt/models/demo/")}
    assert {Path(name).name for name in demo if not name.endswith(".py")} == {
        "README.md",
        "calib.npz",
        "eval.npz",
        "naive_inception.onnx",
    }
    assert "pwopt/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_sdist_builds_alone(built: Path) -> None:
    # `built` made the wheel from it; here, that no file of the packages is there twice.
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "README.md", "LICENSE", "passes/bottleneck.py"} <= {*names}
    assert len(names) == len({*names})


def test_pyproject_lists_every_package() -> None:
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    found = {Path(module).parent.as_posix().replace("/", ".") for module in modules()}
    assert set(config["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("module", ["pwopt", "pwopt.cli", "pwopt.errors"])
def test_imports_are_light(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert HEAVY & {*done.stdout.split()} == set()


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "analyze --help", "rewrite --help", "learn --help"]
)
def test_help_is_light(arguments: str) -> None:
    script = (
        "import sys, pwopt.cli\n"
        "pwopt.cli.main(sys.argv[1:], prog_name='pwopt', standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pwopt" in done.stdout
    assert HEAVY & {*done.stderr.split()} == set()
