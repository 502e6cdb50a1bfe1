"""Code outside the package: a loss, an optimizer, a schedule or a projector of one's own, named FILE.py:NAME.

A configuration names it (`--loss.own my_loss.py:loss`), or it is handed to `train.run.run`. The resolved configuration
records FILE.py:NAME#DIGEST, where the digest covers the whole file, so that a run cannot be resumed with other code.
A checkpoint alone never starts code: whoever loads it names the file again.
"""

import functools
import hashlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.errors import UserError, hint

DIGEST_DIGITS = 16
_given: dict[str, Any] = {}
"""Objects handed over in this process, by recorded name."""


class OwnCode(NamedTuple):
    """FILE.py:NAME, and the digest if it was recorded."""

    file: str
    name: str
    digest: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.name}" + (f"#{self.digest}" if self.digest else "")

    @property
    def identity(self) -> tuple[str, str | None]:
        """What must stay the same; the file may lie elsewhere."""
        return self.name, self.digest


def parse_own(text: str) -> OwnCode:
    """Parses FILE.py:NAME or FILE.py:NAME#DIGEST. Raises UserError."""
    place, _, digest = text.partition("#")
    file, _, name = place.rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"{text!r} names no code; expected FILE.py:NAME.")
    return OwnCode(file, name, digest or None)


def record(text: str) -> str:
    """Returns FILE.py:NAME#DIGEST. Raises UserError if there is no such file, or if it is not the recorded one."""
    own = parse_own(text)
    if text in _given:
        return text
    try:
        digest = _digest(Path(own.file).read_bytes())
    except OSError as error:
        raise UserError(f"{own.file}: cannot be read ({error.strerror}); it should define {own.name}.") from error
    if own.digest not in (None, digest):
        raise UserError(
            f"{own.file} has changed since it was recorded ({own.digest} then, {digest} now); put the old file back."
        )
    return str(own._replace(digest=digest))


def load(text: str) -> Any:
    """Returns the object of that name: the one handed over in this process, or else from its file. Raises UserError."""
    return _given[text] if text in _given else _load_file(record(text))


def hand_over(thing: Any) -> str:
    """Returns the recorded name of a function or class that was handed over in Python, for `load`."""
    named = thing.func if isinstance(thing, functools.partial) else thing
    named = named if hasattr(named, "__qualname__") else type(named)
    try:
        file = inspect.getsourcefile(named) or ""
        content = Path(file).read_bytes() if Path(file).is_file() else inspect.getsource(named).encode()
    except (OSError, TypeError) as error:
        raise UserError(f"{thing!r}: its source cannot be found; define it in a file.") from error
    text = str(OwnCode(file, named.__qualname__.split(".")[-1].strip("<>"), _digest(content)))
    _given[text] = thing
    return text


def same(one: str | None, other: str | None) -> bool:
    """Returns whether two recorded names mean the same code, wherever its file lies."""
    if one is None or other is None:
        return one is other
    return parse_own(one).identity == parse_own(other).identity


@functools.lru_cache
def _load_file(text: str) -> Any:
    own = parse_own(text)
    spec = importlib.util.spec_from_file_location(f"own_code_{own.digest}", own.file)
    if spec is None or spec.loader is None:
        raise UserError(f"{own.file}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"{own.file}: {type(error).__name__}: {error}.") from error
    if not hasattr(module, own.name):
        raise UserError(f"{own.file}: has no {own.name}{hint(own.name, list(vars(module)))}.")
    return getattr(module, own.name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS]
