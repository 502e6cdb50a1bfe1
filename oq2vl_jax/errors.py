"""What a user caused, and how a command says it: one sentence on stderr, exit code 2, no traceback."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A problem the user can mend. The message says file or key, expected, got, and what to do.

    Messages quote other software's, which end in a full stop or do not: two at the end become one.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(r"(?<!\.)\.\.$|(?<=\?)\.$", lambda found: "." if found[0] == ".." else "", message))


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main; a UserError, a full disk or a forbidden folder become one line and exit 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads the output has enough of it: head, or a pager that was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if not is_full_or_forbidden(error):
            raise
        print(f"error: {of_files(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    errno.ELOOP: "check the path", errno.ENAMETOOLONG: "choose a shorter path",
    errno.EACCES: "choose a path that you may use", errno.EPERM: "choose a path that you may use",
    errno.EROFS: "choose a path that you may use",
}  # fmt: skip
"""What only a user can have caused. A file that is missing can be our mistake as well: it keeps its traceback, and what
a user names is looked for before anything else."""


def of_files(error: Exception) -> str:
    """The sentence of an error that is_full_or_forbidden knows."""
    texts = [os.strerror(number) for number in FULL]
    reason = getattr(error, "strerror", None) or next((text for text in texts if text in str(error)), str(error))
    name, number = getattr(error, "filename", None), getattr(error, "errno", None)
    remedy = REMEDIES.get(number or 0, "make room, and give the same command again: what was whole is still whole")
    return f"{f'{name}: ' if name else ''}{reason}; {remedy}."


def is_full_or_forbidden(error: Exception) -> bool:
    """A full disk, a path that cannot be, or missing permission; libraries below Python's own files say that the disk
    is full in text only."""
    if isinstance(error, OSError):
        return error.errno in (*FULL, *REMEDIES)
    return any(os.strerror(number) in str(error) for number in FULL)


def hint(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known word, or nothing; it stands before the full stop."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
