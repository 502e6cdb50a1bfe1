"""Reads the text of a compiled program (XLA's HLO): instructions, how often each runs, and the bytes of its arrays."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
               "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


class Instruction(NamedTuple):
    """A line of HLO. shape: as written, a tuple in parentheses. op: the opcode. line: the whole line."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    line: str
    is_root: bool


class Execution(NamedTuple):
    """An instruction, how often it runs, and the instructions of its computation by name."""

    instruction: Instruction
    times: float
    scope: dict[str, Instruction]


def executions(
    bodies: dict[str, list[Instruction]],
    unknown_trips: dict[str, float] | None = None,
    longest_branch: float | None = None,
) -> Iterator[Execution]:
    """Yields every instruction of one run of a program with its number of runs; the inside of fusions is left out.

    bodies: the program's computations. unknown_trips: trip counts, by named scope, of loops whose length the text does
    not state; 1 for other scopes.
    longest_branch: share of the runs in which a conditional takes its longest branch; None: count every branch fully.
    """

    def unknown(line: str) -> float:
        scopes = re.search(r'op_name="([^"]*)"', line)
        of_loop = scopes[1].split("/") if scopes else []
        return next((trips for scope, trips in (unknown_trips or {}).items() if scope in of_loop), 1)

    def share(is_longest: bool) -> float:
        if longest_branch is None:
            return 1
        return longest_branch if is_longest else 1 - longest_branch

    def visit(name: str, times: float) -> Iterator[Execution]:
        scope = {instruction.name: instruction for instruction in bodies.get(name, ())}
        for instruction in scope.values():
            yield Execution(instruction, times, scope)
            line, op = instruction.line, instruction.op
            if op == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                yield from visit(called(line, "body"), times * (int(trips[1]) if trips else unknown(line)))
            elif op == "conditional":
                names = branches(line)
                longest = max(names, key=lambda name: len(bodies.get(name, ())))
                for branch in names:
                    yield from visit(branch, times * share(branch == longest))
            elif op == "call":
                yield from visit(called(line, "to_apply"), times)
            elif op == "async-start":
                yield from visit(called(line, "calls"), times)

    yield from visit("ENTRY", 1)


def computations(text: str) -> dict[str, list[Instruction]]:
    """Returns {name: instructions} of the computations of a module; the entry computation is named "ENTRY"."""
    bodies: dict[str, list[Instruction]] = {}
    name = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = "ENTRY" if head[1] else head[2]
            bodies[name] = []
        elif name and (match := INSTRUCTION.match(line)):
            is_root, instruction_name, shape, op, arguments = match.groups()
            operands = re.findall(r"%([\w.\-]+)", arguments[: end_of_arguments(arguments)])
            bodies[name].append(Instruction(instruction_name, shape, op, tuple(operands), line, bool(is_root)))
    return bodies


def end_of_arguments(text: str) -> int:
    """Returns the index of the parenthesis that closes the one just before `text`; len(text) if it is not closed."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text)


def called(line: str, key: str) -> str:
    """Returns the computation that an instruction names under `key`, "" if it names none."""
    match = re.search(rf"\b{key}=%([\w.\-]+)", line)
    return match[1] if match else ""


def branches(line: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    return [called(line, "true_computation"), called(line, "false_computation")]


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in a shape."""
    return [
        math.prod(int(n) for n in dims.split(",") if n) * DTYPE_BYTES[dtype]
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dtype in DTYPE_BYTES
    ]


def dims_of(shape: str) -> list[int]:
    """Returns the dimensions of the first array in a shape."""
    match = re.search(r"\w+\[([\d,]*)\]", shape)
    return [int(n) for n in match[1].split(",") if n] if match else []
