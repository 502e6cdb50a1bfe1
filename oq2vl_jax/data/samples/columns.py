"""Which columns of a parquet file make a sample: found by the schema, or told by --columns image=jpg text=caption.

image   bytes, a struct with bytes and path, a path under --images, or a list of them
text    a caption (string); a conversation (a list of structs, or JSON); a document (a list of strings, null or not)
id      the key of the sample
"""

import json
from typing import Any, Literal, NamedTuple

from oq2vl_jax.data.samples.chats import TALKS
from oq2vl_jax.errors import UserError, hint

Kind = Literal["caption", "conversation", "document"]

IMAGES = ("images", "image", "jpg", "png", "webp", "image_info")
CONVERSATIONS, DOCUMENTS = ("conversations", "messages"), ("texts", "text_list")
"""Columns of conversations; and of documents, if they are lists of strings, else of conversations."""
CAPTIONS = ("caption", "text", "txt", "captions")
KEYS = ("uid", "key", "id", "__key__", "index")
ROLES = {
    "image": "image",
    "images": "image",
    "text": "text",
    "caption": "text",
    "id": "id",
    "key": "id",
} | dict.fromkeys(TALKS, "text")
"""Names on the left of --columns -> what they tell."""


class Columns(NamedTuple):
    """Names of the columns; None for one that the file does not have. kind: what the column of text holds."""

    image: str | None
    text: str
    id: str | None
    kind: Kind


def find_columns(path: str, schema: Any, told: tuple[str, ...] = ()) -> Columns:
    """Returns the columns of a pyarrow schema. Raises UserError with its columns if they make no sample."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]}; write the file with names of their own.")
    chosen = told_columns(path, schema, told)
    image = chosen.get("image") or best_image(path, schema)
    key = chosen.get("id") or first(schema, KEYS, is_key)
    talks = (name for name in (*CONVERSATIONS, *DOCUMENTS) if name in schema.names)
    text = chosen.get("text") or next((name for name in talks if kind_of_text(name, schema.field(name).type)), None)
    text = text or first(schema, CAPTIONS, is_string)
    kind = kind_of_text(text, schema.field(text).type) if text else None
    for role, name, fits, what in (("image", image, is_image, "picture"), ("text", text, is_talk, "text"),
                                   ("id", key, is_key, "name of a sample")):  # fmt: skip
        if name is not None and not fits(schema.field(name).type):
            raise UserError(f"{path}: --columns {role}={name}: {name} is {schema.field(name).type}, and no {what}.")
    if text is None or kind is None or (image is None and kind != "conversation"):
        raise UserError(
            f"{path}: its columns are {', '.join(f'{field.name} ({field.type})' for field in schema)[:600]}; "
            f"looked for a text in {', '.join((*CONVERSATIONS, *DOCUMENTS, *CAPTIONS))} and a picture in "
            f"{', '.join(IMAGES)}. {'' if told else suggestion(path, schema)}".rstrip()
        )
    return Columns(image, text, key, kind)


def best_image(path: str, schema: Any) -> str | None:
    """Returns the column of pictures, one of bytes before one of names. Raises UserError if none can be read."""
    named = [name for name in IMAGES if name in schema.names]
    fitting = [name for name in named if is_image(schema.field(name).type)]
    if named and not fitting and not any(is_empty(schema.field(name).type) for name in named):
        raise UserError(
            f"{path}: column {named[0]} is {schema.field(named[0]).type}, and no picture; --columns image=COLUMN names "
            "another one."
        )
    return next((name for name in fitting if not is_name(schema.field(name).type)), next(iter(fitting), None))


def told_columns(path: str, schema: Any, told: tuple[str, ...]) -> dict[str, str]:
    """Returns what --columns tells: image, text, id -> column. Raises UserError for another name or column."""
    chosen = {}
    for entry in told:
        role, _, column = entry.partition("=")
        if role not in ROLES or not column:
            raise UserError(f"--columns {entry}: expected image=COLUMN, text=COLUMN or id=COLUMN.")
        if column not in schema.names:
            raise UserError(
                f"--columns {entry}: {path} has no column {column}{hint(column, schema.names)}; "
                f"it has {', '.join(schema.names)}."
            )
        if ROLES[role] in chosen:
            raise UserError(f"--columns {entry}: {ROLES[role]} is told twice.")
        chosen[ROLES[role]] = column
    return chosen


def suggestion(path: str, schema: Any) -> str:
    """Returns the --columns that would read the file, as far as its types tell."""
    images = [field.name for field in schema if is_image(field.type) and not is_name(field.type)]
    texts = [field.name for field in schema if is_string(field.type) and field.name not in KEYS]
    texts += [field.name for field in schema if is_talk(field.type) and not is_string(field.type)]
    for image in images or [None]:
        for text in texts:
            told = ((f"image={image}",) if image else ()) + (f"text={text}",)
            try:
                find_columns(path, schema, told)
            except UserError:
                continue
            return f"--columns {' '.join(told)} may be meant."
    return "No columns here make a sample."


def first(schema: Any, names: tuple[str, ...], fits: Any) -> str | None:
    return next((name for name in names if name in schema.names and fits(schema.field(name).type)), None)


def kind_of_text(name: str, kind: Any) -> Kind | None:
    """Returns what a column of text holds, by its type; a string is a conversation if its name says so."""
    if is_string(kind):
        return "conversation" if name in TALKS else "caption"
    if is_list(kind) and is_string(kind.value_type):
        return None if name in CONVERSATIONS else "document"
    return "conversation" if is_talk(kind) else None


def is_talk(kind: Any) -> bool:
    from pyarrow import types

    return is_string(kind) or (is_list(kind) and (is_string(kind.value_type) or types.is_struct(kind.value_type)))


def is_image(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if is_list(kind) else kind
    if types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path", "image_base64", "image_name"})
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return is_string(kind) or any(
        test(kind)
        for test in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    )


def is_name(kind: Any) -> bool:
    """Returns whether a column of pictures only names them."""
    return is_string(kind.value_type if is_list(kind) else kind)


def is_empty(kind: Any) -> bool:
    """Returns whether every cell of a column is null by its type."""
    from pyarrow import types

    return types.is_null(kind) or (is_list(kind) and types.is_null(kind.value_type))


def is_key(kind: Any) -> bool:
    from pyarrow import types

    return is_string(kind) or types.is_integer(kind)


def is_list(kind: Any) -> bool:
    from pyarrow import types

    tests = types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view
    return any(test(kind) for test in tests)


def is_string(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def talk_of(cell: Any) -> Any:
    """Returns the conversation of a cell; some data sets keep it as JSON. Raises ValueError."""
    return json.loads(cell) if isinstance(cell, str) else cell
