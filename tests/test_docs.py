"""What the documents show: commands that parse, links that lead somewhere, nothing left to fill."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest
from helpers import REPOSITORY

from pwopt.cli import main
from pwopt.registry import pipeline

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
IN_DOCUMENT = [pytest.param(path, id=path.name) for path in DOCUMENTS]

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(?:\S*/)?pwopt (.+)$")
MENTION = re.compile(r"`pwopt ([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands() -> Iterator[tuple[str, str]]:
    """Yield each line of a code block that runs pwopt, with the document's name."""
    for path in DOCUMENTS:
        for block in FENCE.findall(path.read_text("utf-8")):
            for line in block.replace("\\\n", "").splitlines():
                if found := COMMAND.match(line):
                    yield path.name, found[1]


def mentions() -> Iterator[tuple[str, str]]:
    """Yield what the prose calls a command of pwopt; arguments may be left out."""
    for path in DOCUMENTS:
        for text in MENTION.findall(FENCE.sub("", path.read_text("utf-8"))):
            yield path.name, text


def subcommand(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"pwopt has no command '{name}'"
    return command


@pytest.mark.parametrize(("document", "line"), list(commands()))
def test_commands_in_code_blocks_parse(document: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    with suppress(click.exceptions.Exit):  # --help
        context = subcommand(name).make_context(name, arguments)
        if spec := context.params.get("pipeline"):
            assert pipeline(spec).passes


@pytest.mark.parametrize(("document", "text"), list(mentions()))
def test_options_mentioned_in_prose_exist(document: str, text: str) -> None:
    name, *arguments = shlex.split(text)
    command = main if name.startswith("-") else subcommand(name)
    parameters = command.get_params(click.Context(command, **main.context_settings))
    known = {option for parameter in parameters for option in parameter.opts}
    given = {word.split("=")[0] for word in (name, *arguments) if word.startswith("-")}
    assert given <= known


@pytest.mark.parametrize("path", IN_DOCUMENT)
def test_relative_links_lead_to_files(path: Path) -> None:
    links = [link for link in LINK.findall(path.read_text("utf-8")) if ":" not in link]
    files = [path.parent / link.split("#")[0] for link in links if not link.startswith("#")]
    assert [str(file) for file in files if not file.exists()] == []


@pytest.mark.parametrize("path", IN_DOCUMENT)
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    assert re.findall(r"@@\w*", path.read_text("utf-8")) == []
