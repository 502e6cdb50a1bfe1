"""The house: which room may import which, and what a stranger relies on."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from oq2vl_jax.command import COMMANDS

FLOOR = ("bounds", "command", "config", "config_files", "devices", "digests", "errors", "html", "jobs", "jsonl", "lock",
         "memory", "own_code", "paths", "remote", "runtime")  # fmt: skip
"""Modules of oq2vl_jax that every room may import; they import each other alone."""
ROOMS: dict[str, tuple[str, ...]] = {
    "oq2vl_jax.data.samples": (),
    "oq2vl_jax.data.text": ("oq2vl_jax.data.samples",),
    "oq2vl_jax.data.packing": ("oq2vl_jax.data.samples", "oq2vl_jax.data.text"),
    "oq2vl_jax.data.loading": ("oq2vl_jax.data.samples", "oq2vl_jax.data.text", "oq2vl_jax.data.packing"),
    "oq2vl_jax.data": ("oq2vl_jax.data.samples", "oq2vl_jax.data.text", "oq2vl_jax.data.packing"),
    "oq2vl_jax.model": ("oq2vl_jax.trees",),
    "oq2vl_jax.trees": (),
    "oq2vl_jax.sharding": ("oq2vl_jax.trees",),
    "oq2vl_jax.checkpoint_digests": (),
    "oq2vl_jax.remote_checkpoints": ("oq2vl_jax.checkpoint_digests",),
    "oq2vl_jax.checkpoint": ("oq2vl_jax.checkpoint_digests", "oq2vl_jax.remote_checkpoints", "oq2vl_jax.trees"),
    "oq2vl_jax.weights": ("oq2vl_jax.checkpoint", "oq2vl_jax.checkpoint_digests", "oq2vl_jax.model", "oq2vl_jax.trees"),
    "oq2vl_jax.generate": ("oq2vl_jax.model", "oq2vl_jax.data.text", "oq2vl_jax.data.samples", "oq2vl_jax.sharding",
                           "oq2vl_jax.checkpoint", "oq2vl_jax.weights", "oq2vl_jax.trees"),
    "oq2vl_jax.train": ("oq2vl_jax.model", "oq2vl_jax.data", "oq2vl_jax.data.samples", "oq2vl_jax.data.text",
                        "oq2vl_jax.data.packing", "oq2vl_jax.data.loading", "oq2vl_jax.sharding",
                        "oq2vl_jax.checkpoint", "oq2vl_jax.checkpoint_digests", "oq2vl_jax.remote_checkpoints",
                        "oq2vl_jax.weights", "oq2vl_jax.trees", "oq2vl_jax.generate"),
    "oq2vl_jax.curate": ("oq2vl_jax.data.samples", "oq2vl_jax.data.text", "oq2vl_jax.model", "oq2vl_jax.sharding",
                         "oq2vl_jax.checkpoint", "oq2vl_jax.checkpoint_digests", "oq2vl_jax.remote_checkpoints",
                         "oq2vl_jax.weights", "oq2vl_jax.generate", "oq2vl_jax.eval"),
    "oq2vl_jax.eval": ("oq2vl_jax.data.samples", "oq2vl_jax.data.text", "oq2vl_jax.generate"),
    "oq2vl_jax.lab": ("oq2vl_jax.train", "oq2vl_jax.eval", "oq2vl_jax.data.samples", "oq2vl_jax.data.packing"),
    "oq2vl_jax.compare": ("oq2vl_jax.lab",),
    "oq2vl_jax.ablate": ("oq2vl_jax.lab", "oq2vl_jax.eval"),
    "oq2vl_jax.serve": ("oq2vl_jax.data.samples", "oq2vl_jax.data.text", "oq2vl_jax.model", "oq2vl_jax.generate"),
}  # fmt: skip
"""What each room may import besides itself and the floor. A new room is refused until it is named here."""
TOP = ("oq2vl_jax.bench", "oq2vl_jax.demo", "oq2vl_jax.interface", "convert", "configs")
"""May import anything; no room imports them."""
PUBLIC_NAMES = Path("oq2vl_jax/__init__.py")
"""Imports the interface for type checkers alone; at run time when a name is first used."""
NUMERICS = {"jax", "flax", "optax", "orbax"}
THIRD_PARTY_OF_MODELS = {"jax", "flax", "numpy", "jaxtyping"}
FILES = sorted(path for folder in ("oq2vl_jax", "convert", "configs") for path in Path(folder).rglob("*.py"))


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)


def imported(path):
    """Every module a file imports, at any depth of the code; `from package import module` counts as the module."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                package = path.parts[: len(path.parts) - node.level]
                name = ".".join([*package, *([name] if name else [])])
            below = {f"{name}.{alias.name}" for alias in node.names}
            modules |= {found for found in below if found in MODULES} or {name}
    return modules


MODULES = {module_of(path) for path in FILES}


def is_in(module, room):
    return module == room or module.startswith(f"{room}.")


def room_of(module):
    """The room of a module of ours: the longest name that it lies in; "" for the floor."""
    if module == "oq2vl_jax" or module.removeprefix("oq2vl_jax.").split(".")[0] in FLOOR:
        return ""
    return max((room for room in (*ROOMS, *TOP) if is_in(module, room)), key=len, default=None)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_its_own_room_and_what_that_room_may(path):
    room = room_of(module_of(path))
    assert room is not None, f"{path}: name its room in ROOMS"
    if room in TOP or path == PUBLIC_NAMES:
        return
    allowed = ROOMS.get(room, ())
    for module in imported(path):
        if module.split(".")[0] in ("oq2vl_jax", "convert", "configs"):
            other = room_of(module)
            is_allowed = other in ("", room, *allowed) or any(is_in(module, name) for name in allowed)
            assert is_allowed, f"{path} of {room or 'the floor'} imports {module}"


def test_no_room_reaches_itself_through_others():
    for room in ROOMS:
        seen, left = set(), list(ROOMS[room])
        while left:
            other = left.pop()
            if other not in seen:
                seen.add(other)
                left += ROOMS.get(other, ())
        assert room not in seen, f"a circle through {room}"


def test_no_two_files_import_each_other():
    graph = {module_of(path): imported(path) & MODULES for path in FILES if path.name != "__init__.py"}
    pairs = {(a, b) for a, found in graph.items() for b in found if a != b and a in graph.get(b, ())}
    assert not pairs


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_packages_stay_where_they_are_allowed(path):
    tops = {module.split(".")[0] for module in imported(path)}
    module = module_of(path)
    if is_in(module, "oq2vl_jax.data") or (room_of(module) == "" and module != "oq2vl_jax.runtime"):
        assert not tops & NUMERICS, "numpy alone below data/ and on the floor"
    if is_in(module, "oq2vl_jax.model"):
        third = tops - THIRD_PARTY_OF_MODELS
        assert third <= {"oq2vl_jax", "functools", "math", "collections", "typing", "dataclasses", "enum"}
    if not is_in(module, "convert"):
        assert "torch" not in tops


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_say_something_and_files_have_a_docstring(path):
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{path} lacks a docstring"


def test_a_page_has_a_line_for_every_file():
    page = Path("docs/code.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert listed == {str(path) for path in FILES if path.read_text().strip() and not path.is_relative_to("configs")}


def test_the_wheel_has_every_package():
    listed = set(tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    ours = {str(path.parent).replace("/", ".") for path in Path("oq2vl_jax").rglob("__init__.py")}
    bridge = {f"oq2vl_jax.{str(path.parent).replace('/', '.')}" for path in Path("convert").rglob("__init__.py")}
    configs = {f"oq2vl_jax.{str(path.parent).replace('/', '.')}" for path in Path("configs").rglob("*.py")}
    assert listed == ours | bridge | configs


def test_the_console_script_knows_every_command():
    modules = {module for module, _ in COMMANDS.values()}
    commands = {module_of(path) for path in FILES if "run_command(main)" in path.read_text()}
    assert commands - {"oq2vl_jax.command", "oq2vl_jax.errors"} <= modules | {
        "oq2vl_jax.demo.easy_vqa",
        "oq2vl_jax.demo.emoji",
        "oq2vl_jax.demo.report",
    }


def test_links_of_the_pages_lead_somewhere():
    for page in (Path("README.md"), *Path("docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_the_readme_is_short():
    assert len(Path("README.md").read_text().splitlines()) < 150
