"""Faults of remote file systems: waits for those that pass, and gives the others a sentence.

An endpoint that is away, slow or overloaded is asked again for PATIENCE_SECONDS, with a line on stderr; s3fs and gcsfs
themselves give up after 7 to 35 s. Whatever cannot pass (no such bucket, no credentials, no permission) ends at once.
Either way the error is a UserError, never an OSError: readers of tars take those for damage of the file.
"""

import asyncio
import errno
import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from oq2vl_jax.errors import UserError

T = TypeVar("T")
PATIENCE_VARIABLE = "OQ2VL_JAX_PATIENCE_SECONDS"
PATIENCE_SECONDS = 300.0
LONGEST_PAUSE_SECONDS = 15.0
SECONDS_BETWEEN_LINES = 60.0

LIBRARIES = ("botocore", "aiobotocore", "s3fs", "gcsfs", "aiohttp", "google", "fsspec", "httpx", "huggingface_hub",
             "requests", "urllib3", "adlfs", "azure")  # fmt: skip
"""Packages whose exceptions are faults of a remote file system."""
PERMANENT = ("ParamValidationError", "NoRegionError", "InvalidRegionError", "InvalidEndpointConfigurationError")
CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
               "TokenRetrievalError", "DefaultCredentialsError", "RefreshError")  # fmt: skip
HOW_TO_LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
    "hf": "set HF_TOKEN, or run hf auth login",
}
FAULT_OF_POLARS, REFUSAL_OF_POLARS = "object-store error: Generic", "lacked the necessary privileges"
"""Polars reads parquet files by itself, and tells what failed by the text alone."""
OF_THE_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""Answers, not faults: the caller knows what they mean."""
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of the disk here, during a download."""
MAY_PASS = (408, 409, 425, 429)
"""Of the HTTP status codes from 400 to 499. 409: another writer at the same moment."""
MAY_PASS_NAMES = ("RequestTimeout", "IncompleteBody", "BadDigest")
"""Codes of S3 with status 400."""


def patiently(path: str, function: Callable[..., T], *arguments: Any) -> T:
    """Returns function(*arguments), an operation on a remote path, and asks again while its fault may pass.

    Raises UserError for a fault that cannot pass or has not passed in time. Errors that are answers, such as
    FileNotFoundError, go through.
    """
    begin, pause, next_line = time.monotonic(), 0.5, 0.0
    seconds = patience_seconds()
    while True:
        try:
            return function(*arguments)
        except Exception as error:
            problem = permanent_problem(path, error)
            if problem is not None:
                raise UserError(f"{path}: {problem}") from error
            if not is_fault(error):
                raise
            waited = time.monotonic() - begin
            if waited + pause > seconds:
                raise UserError(
                    f"{path}: no answer for {waited:.0f} s ({one_line(error)}); give the same command again when it is "
                    "back: what was whole is still whole."
                ) from error
            if waited >= next_line:
                print(
                    f"{path}: {one_line(error)}; asking again for {seconds - waited:.0f} s", file=sys.stderr, flush=True
                )
                next_line = waited + SECONDS_BETWEEN_LINES
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def patience_seconds() -> float:
    try:
        return float(os.environ[PATIENCE_VARIABLE])
    except KeyError:
        return PATIENCE_SECONDS
    except ValueError as error:
        raise UserError(f"{PATIENCE_VARIABLE} = {os.environ[PATIENCE_VARIABLE]!r}, expected seconds.") from error


def permanent_problem(path: str, error: Exception) -> str | None:
    """Returns what is wrong and what to do, if asking again is of no use; else None."""
    names = {type(each).__name__ for each in chain_of(error)}
    protocol = path.partition("://")[0]
    log_in = HOW_TO_LOG_IN.get({"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), "log in first")
    if names & set(CREDENTIALS):
        return f"no credentials ({one_line(error)}); {log_in}."
    text = str(error)
    is_forbidden = text.startswith("Forbidden") or REFUSAL_OF_POLARS in text  # gcsfs gives no status
    if isinstance(error, PermissionError) or status_of(error) in (401, 403) or is_forbidden:
        return f"no permission ({one_line(error)}); ask for it, or {log_in}."
    if "NoSuchBucket" in names or (isinstance(error, FileNotFoundError) and "bucket does not exist" in str(error)):
        return "there is no such bucket; make it first, or check its name."
    if "FileExpired" in names:
        return "the file was replaced while it was read; give the same command again."
    status = status_of(error)
    is_refused = status is not None and 400 <= status < 500 and status not in MAY_PASS
    if any(name in text for name in MAY_PASS_NAMES) or isinstance(error, TimeoutError | FileExistsError):
        return None
    if names & set(PERMANENT) or (is_refused and not isinstance(error, OF_THE_PATH)):
        return f"{one_line(error)}."
    return None


def is_fault(error: Exception) -> bool:
    """Returns whether an error is of the connection or of the server, rather than an answer or of this machine."""
    if isinstance(error, (UserError, *OF_THE_PATH)):
        return False
    if isinstance(error, OSError):  # includes ConnectionError and TimeoutError
        return error.errno not in LOCAL
    if FAULT_OF_POLARS in str(error):
        return True
    return isinstance(error, asyncio.TimeoutError) or type(error).__module__.partition(".")[0] in LIBRARIES


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status code of an error, if it has one."""
    for each in chain_of(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder, name in ((response, "status_code"), (each, "code"), (each, "status")):
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return None


def chain_of(error: BaseException | None) -> list[BaseException]:
    """Returns an error and the errors that it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


class PatientFile(io.RawIOBase):
    """A remote file that is read patiently."""

    def __init__(self, path: str, fs: Any, name: str):
        self._path, self._fs, self._name = path, fs, name
        self._file = patiently(path, fs.open, name, "rb")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = patiently(self._path, self._read, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _read(self, size: int) -> bytes:
        self._file.seek(self._position)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._file.seek(offset if whence != io.SEEK_CUR else self._position + offset,
                                         whence if whence != io.SEEK_CUR else io.SEEK_SET)  # fmt: skip
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
