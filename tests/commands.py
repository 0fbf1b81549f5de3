"""Runs of the command line, in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from lorc_fx import cli

runner = CliRunner(env={"COLUMNS": "200"})


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and what was said; what the command did not mean to raise is raised."""
    result = runner.invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output
