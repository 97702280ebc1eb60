"""The command line, called in this process."""

from __future__ import annotations

from clipsteer.cli import main as cli


def run(capsys, *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err
