"""Reports a checkpoint that cannot be written in one sentence, without the dozen tracebacks of Orbax's threads."""

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any

from oq2vl_jax.errors import UserError, is_full_or_forbidden

LOGGERS = ("absl", "asyncio")
"""Loggers of a failed write: Orbax's, and the event loop's if several writes fail at the same time."""
CLOSED_LOOP = "Event loop is closed"
"""Message of TensorStore's callbacks after another write of the same checkpoint has failed."""


class HeldErrors(logging.Filter):
    """Holds back the errors that Orbax logs; `close` shows them unless the disk was full or forbidden.

    After a full disk the filter stays: Orbax's other threads fail one after the other while the process ends.
    """

    def __init__(self):
        super().__init__()
        self._is_full = False
        self._records: list[logging.LogRecord] = []
        self._loggers, self._hook = [logging.getLogger(name) for name in LOGGERS], sys.unraisablehook
        for logger in self._loggers:
            logger.addFilter(self)
        sys.unraisablehook = self._without_closed_loops

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            self._records.append(record)
        return record.levelno < logging.ERROR

    def _without_closed_loops(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != CLOSED_LOOP:
            self._hook(unraisable)

    def close(self) -> None:
        """Removes the filter and logs the held records; does nothing after a full disk."""
        if self._is_full:
            return
        for logger in self._loggers:
            logger.removeFilter(self)
        sys.unraisablehook = self._hook
        for record in self._records:
            logging.getLogger(record.name).handle(record)
        self._records.clear()

    def explained(self, error: Exception, run_dir: Path) -> Exception:
        """Returns a UserError if the disk is full or forbidden, else shows the held log and returns `error`."""
        if not is_full_or_forbidden(error):
            self.close()
            return error
        self._is_full = True
        whole = sorted(path.name for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())
        newest = f"the newest whole one is {int(whole[-1])}" if whole else "there is none yet"
        numbers = (getattr(error, "errno", None), errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reasons = [os.strerror(number) for number in numbers if number and os.strerror(number) in str(error)]
        return UserError(
            f"{run_dir}: the checkpoint could not be written ({(reasons or [str(error)])[0]}); {newest}. "
            "When there is room and the folder may be written, the same command goes on from there."
        )
