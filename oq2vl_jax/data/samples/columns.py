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
TEXTS = (*TALKS, "text_list")
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
    chosen = told_columns(path, schema, told)
    image = chosen.get("image") or first(schema, IMAGES, is_image)
    key = chosen.get("id") or first(schema, KEYS, lambda kind: True)
    if (text := chosen.get("text")) is not None:
        kind = kind_of_text(text, schema.field(text).type)
        if kind is None:
            raise UserError(f"{path}: --columns text={text}: {text} is {schema.field(text).type}, and no text.")
    else:
        text = first(schema, TEXTS, is_talk) or first(schema, CAPTIONS, is_string)
        kind = kind_of_text(text, schema.field(text).type) if text else None
    if image is not None and not is_image(schema.field(image).type):
        raise UserError(f"{path}: --columns image={image}: {image} is {schema.field(image).type}, and no picture.")
    if text is None or kind is None or (image is None and kind != "conversation"):
        raise UserError(
            f"{path}: its columns are {', '.join(f'{field.name} ({field.type})' for field in schema)[:600]}; "
            f"looked for a text in {', '.join((*TEXTS, *CAPTIONS))} and a picture in {', '.join(IMAGES)}. "
            f"{suggestion(schema)}"
        )
    return Columns(image, text, key, kind)


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
        chosen[ROLES[role]] = column
    return chosen


def suggestion(schema: Any) -> str:
    """Returns the --columns that would read the file, as far as its types tell."""
    image = next((field.name for field in schema if is_image(field.type) and not is_string(field.type)), None)
    text = next((field.name for field in schema if field.name != image and is_talk(field.type)), None)
    text = text or next((field.name for field in schema if is_string(field.type) and field.name not in KEYS), None)
    if text is None:
        return "No column holds text."
    return f"--columns {f'image={image} ' if image else ''}text={text} may be meant."


def first(schema: Any, names: tuple[str, ...], fits: Any) -> str | None:
    return next((name for name in names if name in schema.names and fits(schema.field(name).type)), None)


def kind_of_text(name: str, kind: Any) -> Kind | None:
    """Returns what a column of text holds, by its type; a string is a conversation if its name says so."""
    if is_string(kind):
        return "conversation" if name in TALKS else "caption"
    if is_list(kind) and is_string(kind.value_type):
        return "document"
    return "conversation" if is_talk(kind) else None


def is_talk(kind: Any) -> bool:
    import pyarrow

    return is_string(kind) or (
        is_list(kind) and (is_string(kind.value_type) or pyarrow.types.is_struct(kind.value_type))
    )


def is_image(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if is_list(kind) else kind
    if types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path", "image_base64", "image_name"})
    return is_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def is_string(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)


def talk_of(cell: Any) -> Any:
    """Returns the conversation of a cell; some data sets keep it as JSON. Raises ValueError."""
    return json.loads(cell) if isinstance(cell, str) else cell
