"""Code outside the package: a loss, an optimizer, a schedule or a projector of one's own, named FILE.py:NAME.

A configuration names it (`--loss.own my_loss.py:loss`), or it is handed to `train.run.run`. The resolved configuration
records FILE.py:NAME#DIGEST, where the digest covers the whole file, so that a run cannot be resumed with other code.
FILE.py:NAME*#DIGEST is something that the file alone does not give, such as a partial: it has to be handed over again.
A checkpoint alone never starts code: whoever loads it names the file again.
"""

import functools
import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from oq2vl_jax.errors import UserError, hint

DIGEST_DIGITS = 16
HANDED_OVER = "*"
_given: dict[str, Any] = {}
"""Objects handed over in this process, by recorded name."""
_modules: dict[str, ModuleType] = {}
"""Modules of files that were read in this process, by "FILE.py#DIGEST"."""


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
    place, _, digest = text.rpartition("#") if "#" in text.rpartition(":")[2] else (text, "", "")
    file, _, name = place.rpartition(":")
    if not file or not name.removesuffix(HANDED_OVER).isidentifier():
        raise UserError(f"{text!r} names no code; expected FILE.py:NAME.")
    return OwnCode(file, name, digest or None)


def record(text: str) -> str:
    """Returns FILE.py:NAME#DIGEST. Raises UserError if there is no such file, or if it is not the recorded one."""
    own = parse_own(text)
    if text in _given:
        return text
    if own.name.endswith(HANDED_OVER):
        raise UserError(f"{text} was handed to run in Python, and its file alone does not give it; hand it over again.")
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
    """Returns the object of that name: the one handed over in this process, or else from its file. Raises UserError.

    A file is read once in a process; a change of it while a run goes on has no effect. Load it before jax traces, or
    arrays at the top of the file belong to the trace.
    """
    if text in _given:
        return _given[text]
    own = parse_own(text)
    module = _modules.get(f"{own.file}#{own.digest}")
    if module is None:
        own = parse_own(record(text))
        module = _modules.get(f"{own.file}#{own.digest}") or _run_file(own)
    if not hasattr(module, own.name):
        raise UserError(f"{own.file}: has no {own.name}{hint(own.name, list(vars(module)))}.")
    thing = getattr(module, own.name)
    if not callable(thing):
        raise UserError(f"{own.file}: {own.name} is {type(thing).__name__}, expected a function or a class.")
    return thing


def hand_over(thing: Any) -> str:
    """Returns the recorded name of a function or class that was handed over in Python, for `load`.

    The digest covers its file and the plain arguments of a partial; arrays and what a closure holds are not covered.
    """
    arguments, named = [], thing
    while isinstance(named, functools.partial):
        arguments.append(repr([_plain(value) for value in (*named.args, *sorted(named.keywords.items()))]))
        named = named.func
    named = inspect.unwrap(named)
    named = named if hasattr(named, "__qualname__") else type(named)
    try:
        file = inspect.getsourcefile(named) or ""
        content = Path(file).read_bytes() if Path(file).is_file() else inspect.getsource(named).encode()
    except (OSError, TypeError) as error:
        raise UserError(f"{thing!r}: its source cannot be found; define it in a file.") from error
    is_plain = named is thing and named.__qualname__.isidentifier()
    name = named.__qualname__.split(".")[-1].strip("<>") + ("" if is_plain else HANDED_OVER)
    text = str(OwnCode(file, name, _digest(content + "".join(arguments).encode())))
    _given[text] = thing
    return text


def same(one: str | None, other: str | None) -> bool:
    """Returns whether two recorded names mean the same code, wherever its file lies."""
    if one is None or other is None:
        return one is other
    return parse_own(one).identity == parse_own(other).identity


def _run_file(own: OwnCode) -> ModuleType:
    name = f"own_code_{own.digest}"
    spec = importlib.util.spec_from_file_location(name, own.file)
    if spec is None or spec.loader is None:
        raise UserError(f"{own.file}: not a Python file.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise UserError(f"{own.file}: {type(error).__name__}: {error}.") from error  # the user's own code
    _modules[f"{own.file}#{own.digest}"] = module
    return module


def _plain(value: Any) -> Any:
    """The value itself if its repr tells it apart, else its type."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS]
