"""The entry point; it needs nothing but the standard library, so that it can say what is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits with its status: 0, 2 (a bad workflow or command), 3 (a fault), 130 or 143 (stopped)."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as error:
        print(f'dancegrpo: {error.name} is not installed; the command line needs: pip install "comfy-dancegrpo[headless]"', file=sys.stderr)
        raise SystemExit(2) from None
    from .commands import app

    app(prog_name="dancegrpo")
