"""What a user caused, and how a command says it: one sentence on stderr, exit code 2, no traceback."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A problem the user can mend. The message says file or key, expected, got, and what to do."""


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main and turns UserError into one line and exit 2, Ctrl-C into exit 130."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
