"""The import rules of the house, and what a stranger relies on."""

import ast
from pathlib import Path

import pytest

THIRD_PARTY = ("jax", "flax", "numpy", "jaxtyping")
"""What a model may import."""
FILES = sorted(path for folder in ("oq2vl_jax", "convert", "configs") for path in Path(folder).rglob("*.py"))


def imported(path):
    """Every module a file imports, at any depth of the code."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("path", FILES, ids=str)
def test_import_rules(path):
    tops = {module.split(".")[0] for module in imported(path)}
    ours = {module for module in imported(path) if module.startswith("oq2vl_jax")}
    if path.is_relative_to("oq2vl_jax/model"):
        assert all(module == "oq2vl_jax.config" or module.startswith("oq2vl_jax.model") for module in ours)
        assert tops <= {*THIRD_PARTY, "oq2vl_jax", "functools", "math", "collections", "typing", "dataclasses"}
    if path.is_relative_to("oq2vl_jax/data"):
        assert not tops & {"jax", "flax", "optax", "orbax"}
        assert not any(module.startswith(("oq2vl_jax.model", "oq2vl_jax.train")) for module in ours)
    if not path.is_relative_to("convert"):
        assert "torch" not in tops


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_say_something_and_files_have_a_docstring(path):
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{path} lacks a docstring"


def test_the_readme_has_a_line_for_every_file():
    readme = Path("README.md").read_text()
    missing = [str(path) for path in FILES if path.read_text().strip() and path.name not in readme]
    assert not missing
