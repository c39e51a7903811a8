"""``pwopt passes``."""

import click

from pwopt.cli.options import json_option


@click.command(name="passes")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or explain the one called NAME."""
    from pwopt.errors import SpecError
    from pwopt.registry import passes
    from pwopt.report import passes as report

    known = passes()
    if name is not None and name not in known:
        raise SpecError(f"unknown pass '{name}'; there are {', '.join(known)}")
    shown = list(known.values()) if name is None else [known[name]]
    if as_json:
        click.echo(report.to_json(shown))
    elif name is None:
        report.print_table(shown)
    else:
        report.print_help(shown[0])
