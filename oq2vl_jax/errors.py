"""Reports errors that a user caused: one sentence on stderr, exit code 2, no traceback."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A problem the user can solve. The message says file or key, expected, got, and what to do.

    A message may end in a quoted one with its own full stop or question mark; a second full stop is removed.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(r"(?<!\.)\.\.$|(?<=\?)\.$", lambda match: "." if match[0] == ".." else "", message))


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main; a UserError, a full disk or a forbidden folder become one line and exit 2."""
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:  # the reader of the output has closed it: head, or a pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def sentence_of(error: Exception) -> str | None:
    """Returns what to print of an error that a user caused or can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    return of_files(error) if is_full_or_forbidden(error) else None


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    errno.ELOOP: "check the path", errno.ENAMETOOLONG: "choose a shorter path",
    errno.EACCES: "choose a path that you may use", errno.EPERM: "choose a path that you may use",
    errno.EROFS: "choose a path that you may use",
}  # fmt: skip
"""Errors that only a user can have caused. A missing file can be our mistake as well, so it keeps its traceback; paths
that a user names are checked first."""


def of_files(error: Exception) -> str:
    """Returns the sentence of an error that is_full_or_forbidden accepts."""
    texts = [os.strerror(number) for number in FULL]
    reason = getattr(error, "strerror", None) or next((text for text in texts if text in str(error)), str(error))
    name, number = getattr(error, "filename", None), getattr(error, "errno", None)
    remedy = REMEDIES.get(number or 0, "make room, and give the same command again: what was whole is still whole")
    return f"{f'{name}: ' if name else ''}{reason}; {remedy}."


def is_full_or_forbidden(error: Exception) -> bool:
    """Returns whether an error is a full disk, an impossible path or a missing permission; native libraries report a
    full disk in the text only."""
    if isinstance(error, OSError):
        return error.errno in (*FULL, *REMEDIES)
    return any(os.strerror(number) in str(error) for number in FULL)


def hint(word: str, known: Iterable[str]) -> str:
    """Returns ' (did you mean X?)' for the nearest known word, or ''; put it before the full stop."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
