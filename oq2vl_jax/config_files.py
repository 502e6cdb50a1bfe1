"""Loads a configuration from a file of configs/ or the config.json of a run, and turns it into JSON or flat keys.

Deviation from frameworks with YAML: a config is Python (an ablation is `dataclasses.replace`), its resolved form JSON.
"""

import dataclasses
import json
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from oq2vl_jax import config as config_types
from oq2vl_jax.bounds import check_bounds
from oq2vl_jax.config import ROLE, ModelConfig, TrainConfig
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.paths import is_remote, read_json


def load_config(path: str, model_of: Callable[[TrainConfig], ModelConfig] | None = None) -> TrainConfig:
    """Reads `config` from a .py of configs/, given by path or by name, or from a resolved config.json.

    model_of: gives the model of a configuration that leaves it out. Raises UserError with file, key and a hint.
    """
    if is_remote(path):
        return _read_json(path, path)
    file = Path(path)
    if not file.is_file() and (named := shipped_config(path)) is not None:
        file = named
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob("*") if p.suffix in (".py", ".json")]
        raise UserError(f"{path}: no such config file{hint(path, [*siblings, *shipped_names()])}.")
    config = _read_json(file, path) if file.suffix == ".json" else _run_file(file, path)
    if config.model is None:
        if model_of is None:
            raise UserError(f"{path}: has no model; training takes that of --init-from.")
        config = dataclasses.replace(config, model=model_of(config))
    check_classes(TrainConfig, config, where=path)
    return from_dict(TrainConfig, dataclasses.asdict(config), where=path)  # Python checks no types


def _read_json(file: Path | str, path: str) -> TrainConfig:
    return from_dict(TrainConfig, read_json(str(file)), where=path)


def _run_file(file: Path, path: str) -> TrainConfig:
    if file.suffix != ".py":
        raise UserError(f"{path}: a config is a .py of configs/ or a resolved config.json.")
    try:
        config = runpy.run_path(str(file)).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except TypeError as error:  # a dataclass called with a wrong keyword
        raise UserError(f"{path}: {_explain_keyword(error)}") from error
    except Exception as error:  # a config is the user's own code
        raise UserError(f"{path}: {type(error).__name__}: {error}.") from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path}: must bind `config = TrainConfig(...)`, found {type(config).__name__}.")
    return config


def shipped_folder() -> Path:
    """Returns configs/: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """Returns the names of shipped configurations, such as tiny and ladder/xs. Definitions of ablations are none."""
    folder = shipped_folder()
    files = [*folder.glob("*.py"), *folder.glob("ladder/*.py")]
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)


def shipped_config(name: str) -> Path | None:
    """Returns the file of a shipped configuration; None for any other name."""
    return shipped_folder() / f"{name}.py" if name in shipped_names() else None


def from_dict(cls: Any, values: Any, where: str) -> Any:
    """Inverts dataclasses.asdict; an unknown or missing key, or a value of another type, raises UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object for {cls.__name__}, got {type(values).__name__}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = [f"unknown key {key!r}{hint(key, fields)}" for key in values if key not in fields]
    problems += [
        f"missing key {name!r}"
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING
    ]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)} (in {cls.__name__}).")
    types = get_type_hints(cls)
    arguments = {key: _from_value(types[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        config = cls(**arguments)
        check_bounds(config)
    except UserError as error:  # the dataclass's own checks
        raise UserError(f"{where}: {error}") from error
    return config


def check_classes(kind: Any, value: Any, where: str) -> None:
    """Raises UserError for a subclass of a configuration: config.json would keep the fields of its base alone."""
    if not dataclasses.is_dataclass(value):
        return
    classes = [member for member in members_of(kind) if dataclasses.is_dataclass(member)]
    if classes and type(value) not in classes:
        raise UserError(
            f"{where}: expected {name_of(kind)}, got {type(value).__name__}; a configuration of another class is added "
            "to the field's type as a union (Base | Other)."
        )
    types = get_type_hints(type(value))
    for field in dataclasses.fields(value):
        check_classes(types[field.name], getattr(value, field.name), f"{where}: {field.name}")


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flatten(config: Any) -> dict[str, Any]:
    """Returns {"optimizer.learning_rate": 0.001, ...}; lists such as data.sources stay one value."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[field.name] = value
    return flat


def set_values(config: Any) -> dict[str, Any]:
    """Returns what flatten does, without the values that a field has by default: a later version that adds a field
    gives the same."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{key}": inner for key, inner in set_values(value).items()}
        elif value != field.default:
            flat[field.name] = value
    return flat


def with_value(config: Any, key: str, value: Any) -> Any:
    """Returns a copy with one value replaced. key: dotted, as in flatten; raises UserError with a hint."""
    name, _, rest = key.partition(".")
    names = [field.name for field in dataclasses.fields(config)]
    if name not in names or (rest and not dataclasses.is_dataclass(getattr(config, name))):
        raise UserError(f"{type(config).__name__} has no {key!r}{hint(key, flatten(config))}.")
    return dataclasses.replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def with_changes(config: TrainConfig, changes: Iterable[str], where: str) -> TrainConfig:
    """Returns a copy with values replaced, each given as KEY=VALUE, and checked together. Raises UserError."""
    values: dict[str, Any] = {}
    for change in changes:
        key, is_assignment, text = change.partition("=")
        if not is_assignment:
            raise UserError(f"{where}: {change!r} is no KEY=VALUE, such as optimizer.kind=muon.")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return with_values(config, values, where)


def with_values(config: TrainConfig, changes: dict[str, Any], where: str) -> TrainConfig:
    """Returns a copy with values replaced, by dotted keys as in flatten, and checked together. Raises UserError."""
    values = dataclasses.asdict(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise UserError(f"{where}: unknown key {key!r}{hint(key, flatten(config))}.")
        section[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore
    return from_dict(TrainConfig, values, where=where)


def names_of_role(config_class: Any, role: str) -> set[str]:
    """Returns the dotted names of the fields with that role (OPERATIONAL or INITIAL), nested ones included."""
    names, types = set(), get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        classes = [kind for kind in members_of(types[field.name]) if dataclasses.is_dataclass(kind)]
        has_role = field.metadata.get(ROLE) == role
        if has_role and not classes:
            names.add(field.name)
        for kind in classes:
            inner = {f.name for f in dataclasses.fields(kind)} if has_role else names_of_role(kind, role)
            names |= {f"{field.name}.{name}" for name in inner}
    return names


def _from_value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)
    if len(members_of(kind)) > 1:
        return _from_union(kind, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {value!r}.")
        return tuple(_from_value(get_args(kind)[0], item, where) for item in value)
    if not is_of_type(kind, value):
        raise UserError(f"{where}: expected {name_of(kind)}, got {str(value)[:80]!r}.")
    return value


def _from_union(kind: Any, value: Any, where: str) -> Any:
    """The value as the member it fits.

    An object becomes the dataclass with its very fields, or else the one with most of its keys. Classes that this does
    not tell apart need a field `kind` with a Literal of its own each; without one they are refused.
    """
    members = members_of(kind)
    classes = [member for member in members if dataclasses.is_dataclass(member)]
    if isinstance(value, dict) and classes:
        ranks = [_fit(member, value) for member in classes]
        best = [member for member, rank in zip(classes, ranks, strict=True) if rank == max(ranks)]
        if len(best) > 1:
            names = " and ".join(map(name_of, best))
            raise UserError(f"{where}: {names} have the same fields; give each a field kind with its own Literal.")
        return from_dict(best[0], value, where)
    lists = [member for member in members if get_origin(member) is tuple]
    if isinstance(value, list | tuple) and lists:
        return _from_value(lists[0], value, where)
    if not any(is_of_type(member, value) for member in members):
        raise UserError(f"{where}: expected {name_of(kind)}, got {str(value)[:80]!r}.")
    return value


def _fit(cls: Any, values: dict) -> tuple[bool, int, int]:
    """Ranks a class for an object: its Literals allow the values, its fields hold the keys, no field is left over."""
    types = get_type_hints(cls)
    literals = {name: kind for name, kind in types.items() if get_origin(kind) is Literal and name in values}
    is_allowed = all(values[name] in get_args(kind) for name, kind in literals.items())
    return is_allowed, sum(key in types for key in values), -sum(name not in values for name in types)


def members_of(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_of_type(kind: Any, value: Any) -> bool:
    """Whether a plain value (no list, no object) is of a type: an integer is a float, a bool is neither."""
    if get_origin(kind) is Literal:
        return any(value == item and type(value) is type(item) for item in get_args(kind))
    if not isinstance(kind, type):
        return False
    allowed = (float, int) if kind is float else kind
    return isinstance(value, allowed) and (not isinstance(value, bool) or kind is bool)


def name_of(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list"
    members = members_of(kind)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    others = [name_of(member) for member in members if get_origin(member) is not Literal] if len(members) > 1 else []
    if others or words:
        return " or ".join([*others, *([f"one of {', '.join(map(str, words))}"] if words else [])])
    return "null" if kind is type(None) else kind.__name__


def _explain_keyword(error: TypeError) -> str:
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not match or not hasattr(config_types, match[1]):
        return f"{error}."
    cls, key = getattr(config_types, match[1]), match[2]
    return f"{cls.__name__} has no field {key!r}{hint(key, [field.name for field in dataclasses.fields(cls)])}."
