"""Defines number types with bounds, and checks them for all commands and configurations.

The type of a field states its bounds (`num_rows: Count = 8`). A value outside them, or nan, raises one sentence that
names the flag or the field, the bounds and the value.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from oq2vl_jax.errors import UserError

Command = TypeVar("Command")
INT32_MAX = 2**31 - 1


class Between(NamedTuple):
    """An interval that includes both ends; `is_above` excludes the low end, `is_below` the high one."""

    low: float
    high: float
    is_above: bool = False
    is_below: bool = False

    def holds(self, value: float) -> bool:
        is_excluded = (self.is_above and value == self.low) or (self.is_below and value == self.high)
        return self.low <= value <= self.high and not is_excluded

    def __str__(self) -> str:
        low, high = (f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in (self.low, self.high))
        if self.is_below:
            return f"at least {low} and below {high}"
        return f"above {low} and at most {high}" if self.is_above else f"{low} to {high}"


Count = Annotated[int, Between(1, INT32_MAX)]
CountOrZero = Annotated[int, Between(0, INT32_MAX)]
Seed = Annotated[int, Between(0, INT32_MAX)]
"""An int32, because the device seeds a row's random numbers with one."""
Workers = Annotated[int, Between(1, 1024)]
"""Processes or threads of one machine."""
WorkersOrZero = Annotated[int, Between(0, 1024)]
Length = Annotated[int, Between(1, 2**20)]
"""Tokens of a sequence; Qwen2.5 was trained to 32,768."""
SmallCount = Annotated[int, Between(1, 2**20)]
"""Things held in memory together, such as the rows of a batch."""
Side = Annotated[int, Between(1, 2**14)]
"""Pixels of a side."""
SmallCountOrZero = Annotated[int, Between(0, 2**20)]
Width = Annotated[int, Between(1, 2**20)]
"""Channels of a layer."""
Vocabulary = Annotated[int, Between(1, 2**24)]
CountOrRest = Annotated[int, Between(-1, 2**20)]
"""-1: all that remain."""
Depth = Annotated[int, Between(1, 1024)]
"""Layers, or the heads of a layer."""
Rate = Annotated[float, Between(0.0, 1000.0, is_above=True)]
Share = Annotated[float, Between(0.0, 1.0)]
Below1 = Annotated[float, Between(0.0, 1.0, is_below=True)]
Positive = Annotated[float, Between(0.0, 1e12, is_above=True)]
NotNegative = Annotated[float, Between(0.0, 1e12)]
Temperature = Annotated[float, Between(0.0, 100.0)]
TopP = Annotated[float, Between(0.0, 1.0, is_above=True)]


def check_bounds(config: Any, as_flags: bool = False, prefix: str = "") -> None:
    """Raises UserError that names every number outside its bounds in a dataclass and those nested in it.

    as_flags: names fields as on the command line (--num-rows), not as in a configuration (data.num_rows).
    """
    problems = [
        f"{'--' + name.replace('_', '-') if as_flags else name} must be {bounds}, got {value}"
        for name, bounds, value in out_of_bounds(config, prefix)
    ]
    if problems:
        raise UserError("; ".join(problems) + ".")


def out_of_bounds(config: Any, prefix: str = "") -> Iterator[tuple[str, Between, float]]:
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name, None)
        if dataclasses.is_dataclass(value):
            is_unnamed = any(getattr(mark, "name", None) == "" for mark in getattr(kind, "__metadata__", ()))
            yield from out_of_bounds(value, prefix if is_unnamed else f"{prefix}{name}.")  # tyro.conf.arg(name="")
        else:
            yield from ((prefix + name, bounds, number) for bounds, number in outside(kind, value))


def outside(kind: Any, value: Any) -> Iterator[tuple[Between, float]]:
    """Yields the numbers of a value outside the bounds of its type: `Count`, `Count | None` or `tuple[Count, ...]`."""
    if isinstance(value, tuple | list):
        for item in value:
            for part in get_args(kind):
                yield from outside(part, item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if get_origin(kind) is Annotated:
            yield from ((b, value) for b in kind.__metadata__ if isinstance(b, Between) and not b.holds(value))
        else:
            for part in get_args(kind):
                yield from outside(part, value)


def parse(command: type[Command], prog: str, **options: Any) -> Command:
    """Parses the command line into a dataclass with tyro, and checks the bounds. Raises UserError."""
    import tyro

    parsed = tyro.cli(command, prog=prog, **options)
    check_bounds(parsed, as_flags=True)
    return parsed
