"""python -m oq2vl_jax.lab.child LOCK MODULE [ARGUMENTS]: runs a command as the child of a worker.

It holds LOCK while it runs, after waiting for another child that does. It ends when its worker is gone, so that a
killed worker leaves nothing behind that writes into the folders of its cell.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from oq2vl_jax.lock import HeldError, file_lock

POLL_SECONDS = 0.5


def end_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def main() -> None:
    end_with_parent()
    lock, module, sys.argv = Path(sys.argv[1]), sys.argv[2], sys.argv[2:]
    while True:
        try:
            with file_lock(lock):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
        except HeldError:
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
