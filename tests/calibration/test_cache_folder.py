"""The cache gives back what it was given, or nothing; it never gets in the way."""

import os
from pathlib import Path
from typing import IO

import pytest

from pwopt import cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PWOPT_CACHE", str(tmp_path / "a" / "b"))
    return tmp_path / "a" / "b"


def put(name: str, content: bytes) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(content)

    cache.store(name, write)


def get(name: str) -> bytes | None:
    return cache.load(name, lambda file: file.read())


def test_there_and_back(folder: Path) -> None:
    assert get("kind/one.bin") is None
    put("kind/one.bin", b"1")
    assert get("kind/one.bin") == b"1"
    assert (folder / "kind" / "one.bin").read_bytes() == b"1"


def test_what_cannot_be_read_is_not_there() -> None:
    put("kind/one.bin", b"1")
    assert cache.load("kind/one.bin", lambda file: file.read().missing) is None  # type: ignore


def test_a_place_that_cannot_be_written_is_no_matter(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file in its place")
    put("kind/one.bin", b"1")
    assert get("kind/one.bin") is None


def test_the_longest_unused_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 25)
    for age, name in enumerate(["new", "old", "older"]):
        put(f"kind/{name}.bin", bytes(8))
        os.utime(folder / "kind" / f"{name}.bin", (10**9 - age, 10**9 - age))
    (folder / "kind" / "other.txt").write_bytes(bytes(100))  # not of this kind
    assert get("kind/older.bin")  # is used now
    put("kind/last.bin", bytes(8))
    left = {file.name for file in (folder / "kind").iterdir()}
    assert left == {"new.bin", "older.bin", "last.bin", "other.txt"}


def test_without_a_wish_it_is_the_platforms_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PWOPT_CACHE")
    assert cache.cache_folder().name == "pwopt"
