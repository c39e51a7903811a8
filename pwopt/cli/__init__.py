"""The command line: parse, call the library, print. One file per command, imported when called."""

import importlib
import io
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import click

from pwopt.errors import PwoptError, printable

# OpenBLAS's threads wait for one another in busy loops: on a machine that does other work as well,
# two of them were measured 20 to 50 times slower than one. Read when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# torch's threads do the same (those of OpenMP): beside other work, learning was measured ten times
# slower. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = ("analyze", "rewrite", "learn", "check", "passes", "demo")


class _LazyGroup(click.Group):
    """Imports a command only when it is used, so that ``--help`` does not wait for onnxruntime."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"pwopt.cli.{name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PwoptError as error:
            _fail(error, error.exit_code)
        except BrokenPipeError:  # click ends quietly
            raise
        except OSError as error:  # as of a full disk, where no file of the user's is to blame
            _fail(error, PwoptError.exit_code)


def _fail(error: Exception, exit_code: int) -> NoReturn:
    click.echo(f"pwopt: {printable(str(error))}", err=True)
    sys.exit(exit_code)


def _terminate(_number: int, _frame: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("pwopt"), prog_name="pwopt")
def main() -> None:
    """Make trained ONNX convolutional networks cheaper with 1×1 convolutions."""
    signal.signal(signal.SIGTERM, _terminate)  # as an exception, which removes temporary files
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; else the next file to be opened took its place
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or pipe may not know × and →
        sys.stdout.reconfigure(errors="backslashreplace")
