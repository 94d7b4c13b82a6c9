"""The error that a user can mend, and how a command line reports it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input from the user. Command lines print its message as one line and exit with code 2."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command line's main. A `UserError` or a missing file becomes one line on stderr and exit code 2."""
    try:
        return main() or 0
    except (UserError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
