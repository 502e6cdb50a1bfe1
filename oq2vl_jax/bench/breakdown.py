"""Profiles some steps and adds up the time of their operations by part of the model.

Parts are named scopes (jax.named_scope). A fused operation carries the scope of its root, so shares are of operations,
not of lines of code. On a CPU, times add up over threads, and the gradient of a kernel, which XLA multiplies on other
threads, counts only until it is started.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mode
from typing import Any

import jax
from jax.profiler import ProfileData

from oq2vl_jax.model.scopes import Scope

PARTS = tuple(Scope)
COLLECTIVE = re.compile(r"all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute")
PRODUCT = re.compile(r"dot_general|\bdot|gemm|cublas")


def breakdown(run: Callable[[], None], text: str, folder: str | None = None) -> dict[str, float]:
    """Returns each part's share of device time during run(). text: of the compiled program. folder: keeps the trace."""
    scopes, seconds = scopes_of(text), defaultdict(float)
    for operation, spent in operation_seconds(traced(run, folder)).items():
        if operation in scopes:
            seconds[part_of(operation, scopes[operation])] += spent
    total = sum(seconds.values())
    return {part: seconds[part] / total for part in sorted(seconds, key=seconds.__getitem__, reverse=True)}


def traced(run: Callable[[], None], folder: str | None = None) -> Any:
    """Returns a profile of run(). folder: keeps the trace; None: the trace is deleted."""
    with tempfile.TemporaryDirectory() as temporary:
        with jax.profiler.trace(folder or temporary):
            run()
        traces = sorted(Path(folder or temporary).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return ProfileData.from_file(str(traces[-1]))


def operation_seconds(profile: Any) -> dict[str, float]:
    """Returns {operation: seconds} of the compiled program, without the time of nested operations."""
    seconds: dict[str, float] = defaultdict(float)
    for line in operation_lines(profile):
        for operation, spent in own_times(line):
            seconds[operation] += spent
    return dict(seconds)


def idle_share(profile: Any) -> float:
    """Returns the share of time between the first and the last operation in which none runs; 0 without operations."""
    spans = sorted(span for line in operation_lines(profile) for span in spans_of(line))
    busy, end = 0.0, 0.0
    for start, stop, _ in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0]) if spans else 0.0


def operation_lines(profile: Any) -> list:
    """Returns the lines of a trace that hold operations; on a GPU only its streams, because other lines repeat them."""
    lines = [line for plane in profile.planes for line in plane.lines if spans_of(line)]
    return [line for line in lines if line.name.startswith("Stream")] or lines


def scopes_of(text: str) -> dict[str, str]:
    """Returns {operation: scopes it was traced in} from the text of a compiled program. An operation that the compiler
    made without scopes, such as a product that it rewrote, gets the part that most of its computation belongs to."""
    scopes = {}
    for computation in re.split(r"\n}\n", text):
        traced = dict(re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", computation, re.MULTILINE))
        parts = [named_part(scope) or "" for scope in traced.values()]
        names = re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = ", computation, re.MULTILINE)
        scopes |= dict.fromkeys(names, mode(parts) if parts else "") | traced
    return scopes


def part_of(operation: str, scope: str) -> str:
    """Returns one of PARTS, collectives, matmul (the decoder's other products) or other."""
    if COLLECTIVE.search(operation):
        return "collectives"
    if part := named_part(scope):
        return part
    return "matmul" if PRODUCT.search(scope) or PRODUCT.search(operation) else "other"


def named_part(scope: str) -> str | None:
    return next((part for part in PARTS if re.search(rf"\b{part}\b", scope)), None)


def own_times(line) -> list[tuple[str, float]]:
    """Returns (operation, seconds without nested operations) of one line of a trace."""
    events = sorted(spans_of(line), key=lambda event: (event[0], -event[1]))
    exclusive, stack = [0.0] * len(events), []
    for number, (start, end, _) in enumerate(events):
        while stack and events[stack[-1]][1] <= start:
            stack.pop()
        exclusive[number] += (end - start) / 1e9
        if stack:
            exclusive[stack[-1]] -= (end - start) / 1e9
        stack.append(number)
    return [(event[2], max(time, 0.0)) for event, time in zip(events, exclusive, strict=True)]


def spans_of(line) -> list[tuple[float, float, str]]:
    """Returns (start, end, operation) of the operations on a line of a trace, in nanoseconds."""
    spans = []
    for event in line.events:
        operation = next((value for key, value in event.stats if key == "hlo_op"), None)
        if operation is not None:
            spans.append((event.start_ns, event.start_ns + event.duration_ns, str(operation)))
    return spans
