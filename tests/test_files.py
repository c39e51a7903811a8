"""Files appear whole or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pwopt.errors import PwoptError
from pwopt.files import atomic_write


def write(path: Path, data: bytes = b"new") -> None:
    with atomic_write(path) as file:
        file.write(data)


def test_it_writes_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx")
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("m.onnx", b"new")]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_alone(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(kind), atomic_write(path) as file:  # noqa: PT012
        file.write(b"new")
        raise kind
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_a_killed_process_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from pwopt.files import atomic_write\n"
        "os.fsync = lambda _: (print('writing', flush=True), time.sleep(600))\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'new')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_bytes() == b"old"


def test_permissions_follow_the_umask_or_the_old_file(tmp_path: Path) -> None:
    old = tmp_path / "old.onnx"
    old.touch()
    old.chmod(0o604)
    umask = os.umask(0o027)
    try:
        write(tmp_path / "new.onnx")
        write(old)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new.onnx").stat().st_mode) == 0o640
    assert stat.S_IMODE(old.stat().st_mode) == 0o604


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real.onnx"
    link = tmp_path / "m.onnx"
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(PwoptError, match=reason) as caught:
        write(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert_refused(tmp_path, "is a folder; name a file")
    assert_refused(tmp_path / "missing" / "m.onnx", "No such file or directory")
    assert_refused(tmp_path / "file" / "m.onnx", "Not a directory")
    assert_refused(loop / "m.onnx", "symbolic links")
    assert_refused(tmp_path / ("n" * 300), "File name too long")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(tmp_path / "m.onnx", "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_sync_folders_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"new"
