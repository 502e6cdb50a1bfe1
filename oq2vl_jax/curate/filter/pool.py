"""Reads metadata and scores of all samples once, into columns: ids, one boolean per text or size rule, score values.

A sample takes about 17 bytes, 4 or 8 more per score column and 1 more per rule, twice that at the peak: 128M samples
fit in 8 GB.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.curate.filter.expression import Leaf
from oq2vl_jax.curate.filter.rules import Rule
from oq2vl_jax.data.samples.columns import IMAGES, KEYS
from oq2vl_jax.data.samples.ids import check_distinct, key_of_row, mixed, uid_of_text
from oq2vl_jax.data.samples.parquet import reading_parquet
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.data.text.language import LanguageTest
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.remote.faults import patiently

FILES_PER_BATCH, FILES_OF_TEXTS_PER_BATCH = 64, 8
"""Files whose columns are read at a time. Only the language rule keeps texts, 0.2 GB a million."""
COLUMN_OF_ROWS = "row of its file"
"""Temporary column with the key of a row that no column names (ids.key_of_row)."""
TEXT = "text for the language rule"
"""Temporary column with the texts for the language rules; no file has a column of this name."""
COLUMN_NAMES = {
    "text": ("text", "caption"),
    "original_width": ("original_width", "width"),
    "original_height": ("original_height", "height"),
}
"""Columns that rules read -> their names in files of DataComp and img2dataset."""


class Pool(NamedTuple):
    """Columns of all samples, each of length n in the order of the metadata files. high, low: uint64 ids, 0 if is_valid
    is False. keeps: bool per text, size and uid rule. values: per score column, float32 if the file has float32 (as
    DataComp's do), else float64; NaN for a missing score. conflicts: per score column, the number of scores left out
    because an earlier row gives the sample a different one."""

    high: np.ndarray
    low: np.ndarray
    is_valid: np.ndarray
    keeps: dict[Leaf, np.ndarray]
    values: dict[str, np.ndarray]
    conflicts: dict[str, int]

    def __len__(self) -> int:
        return len(self.high)


def read_pool(metadata: list[str], scores: list[str], rules: list[Rule]) -> Pool:
    """Reads the columns that the rules need. Raises UserError for missing columns and files that are not parquet."""
    import polars as pl

    schema = schema_of(metadata[0])
    names = list(schema)
    if named_by(schema) is None:
        check_distinct(metadata)
    score_columns = sorted({rule.column for rule in rules if rule.column})
    from_scores = [column for column in score_columns if column not in names]
    needed = sorted({column for rule in rules if not rule.column for column in rule.columns})
    present = {column: present_name(column, names, metadata[0]) for column in needed}
    selected = id_columns(schema, metadata[0])
    kinds = score_kinds(metadata[0], score_columns)
    selected += [pl.col(column).cast(kind, strict=False) for column, kind in kinds.items()]
    tests = [rule for rule in rules if not rule.column and not rule.uids]
    languages = [(i, rule) for i, rule in enumerate(tests) if rule.test is None]
    for i, rule in enumerate(tests):
        if rule.test is not None:
            selected.append(rule.test(lambda column: pl.col(present[column])).fill_null(False).alias(f"rule {i}"))
    if languages:
        selected.append(pl.col(present["text"]).alias(TEXT))
    parts = []
    with LanguageTest(os.cpu_count() or 1) as test:
        for batch in batches(metadata, FILES_OF_TEXTS_PER_BATCH if languages else FILES_PER_BATCH):
            frame = collect(scan(batch, schema).select(selected), batch)
            for i, rule in languages:
                frame = frame.with_columns(is_language(frame[TEXT], rule.leaf.arguments, test).alias(f"rule {i}"))
            parts.append(arrays_of(frame.drop(TEXT, strict=False)))
    columns = joined(parts)
    high, low, is_valid = (columns[name] for name in ("high", "low", "is valid"))
    keeps = {rule.leaf: columns[f"rule {i}"] for i, rule in enumerate(tests)}
    keeps |= {rule.leaf: UidSet.load(rule.uids).contains(high, low) for rule in rules if rule.uids}
    values = {column: columns[column] for column in kinds}
    scored, conflicts = read_scores(scores, from_scores, high, low)
    values |= scored
    for column, numbers in values.items():
        if len(numbers) and np.isnan(numbers).all():
            raise UserError(
                f"column {column}: no sample of the metadata has a number in it; do the ids of the files match?"
            )
    return Pool(high, low, is_valid, keeps, values, conflicts)


def arrays_of(frame: Any) -> dict[str, np.ndarray]:
    """Returns a batch's columns as arrays: rules without nulls, ids 0 where "is valid" is False, missing scores NaN."""
    is_valid = (frame["high"].is_not_null() & frame["low"].is_not_null() & frame["is_hex"].fill_null(False)).to_numpy()
    arrays = {half: np.where(is_valid, frame[half].fill_null(0).to_numpy(), np.uint64(0)) for half in ("high", "low")}
    for column in frame.drop("high", "low", "is_hex"):
        arrays[column.name] = (column.fill_null(float("nan")) if column.dtype.is_float() else column).to_numpy()
    return arrays | {"is valid": is_valid}


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins the batches of each column in turn and drops them, so that few columns exist twice at a time."""
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}


def id_columns(schema: dict[str, Any], file: str) -> list[Any]:
    """Returns the expressions high, low and is_hex: from the column uid, else from a column of KEYS, else from the
    row's number in its file (COLUMN_OF_ROWS), each as the readers of samples make them."""
    import polars as pl

    key = named_by(schema)
    if key == "uid":
        uid = pl.col("uid").cast(pl.String)
        is_hex = (uid.str.len_bytes() == 32) & ~uid.str.contains("+", literal=True)
        return [hex_half(uid, 0).alias("high"), hex_half(uid, 16).alias("low"), is_hex.alias("is_hex")]
    if key is None:
        if not set(schema) & set(IMAGES):
            present_name("uid", list(schema), file)  # raises: it is neither metadata nor a data set
        return ids_of_texts(pl.col(COLUMN_OF_ROWS))
    text = pl.col(key).cast(pl.String)
    number = pl.when(text.str.contains("^[0-9]{1,18}$")).then(text).str.to_integer(dtype=pl.UInt64, strict=False)
    high = number.map_batches(lambda keys: pl.Series(mixed(keys.fill_null(0).to_numpy())), return_dtype=pl.UInt64)
    others = ids_of_texts(pl.when(number.is_null()).then(text))  # img2dataset's keys are numbers, and the fast way
    return [
        pl.when(number.is_null()).then(others[0]).otherwise(high).alias("high"),
        pl.coalesce(number, others[1]).alias("low"),
        text.is_not_null().alias("is_hex"),
    ]


def named_by(schema: dict[str, Any]) -> str | None:
    """Returns the column that names a file's samples, as data/samples/columns.py chooses it."""
    import polars as pl

    kinds = (pl.String, pl.Categorical, pl.Enum)
    return next(
        (name for name in KEYS if name in schema and (schema[name].is_integer() or isinstance(schema[name], kinds))),
        None,
    )


def scan(files: list[str], schema: dict[str, Any]) -> Any:
    """Scans files of the same columns; rows that no column names get COLUMN_OF_ROWS."""
    import polars as pl

    if named_by(schema) is not None:
        return pl.scan_parquet(files, missing_columns="raise", extra_columns="ignore")
    number = pl.col("number in its file")
    return pl.concat(
        [
            pl.scan_parquet(file, row_index_name="number in its file").with_columns(
                pl.concat_str(pl.lit(key_of_row(file)), number.cast(pl.String)).alias(COLUMN_OF_ROWS)
            )
            for file in files
        ]
    )


def ids_of_texts(keys: Any) -> list[Any]:
    """Returns the expressions high, low and is_hex from keys of any form, by uid_of_text."""
    import polars as pl

    def ids(texts: Any) -> Any:
        return pl.Series([uid_of_text(text) if text is not None else None for text in texts], dtype=pl.String)

    uid = keys.map_batches(ids, return_dtype=pl.String)
    return [hex_half(uid, 0).alias("high"), hex_half(uid, 16).alias("low"), uid.is_not_null().alias("is_hex")]


def hex_half(uid: Any, start: int) -> Any:
    """Parses 16 hex digits as uint64, null for other text. The parser accepts a leading plus; is_hex excludes it."""
    import polars as pl

    return uid.str.slice(start, 16).str.to_integer(base=16, dtype=pl.UInt64, strict=False)


def batches(files: list[str], size: int = FILES_PER_BATCH) -> Iterator[list[str]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


def collect(frame: Any, files: list[str]) -> Any:
    with reading_parquet(files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")):
        return asked(files[0], frame.collect)


def schema_of(file: str) -> dict[str, Any]:
    """Returns the type of each column."""
    import polars as pl

    with reading_parquet(file):
        if not paths.is_remote(file):
            return dict(pl.read_parquet_schema(file))
        return dict(asked(file, pl.scan_parquet(file).collect_schema))


def asked(file: str, read: Callable[[], Any]) -> Any:
    """Returns read(), which is asked again while the store of a remote file does not answer."""
    return patiently(file, read) if paths.is_remote(file) else read()


def score_kinds(file: str, columns: list[str]) -> dict[str, Any]:
    """Returns the type in which each score column is read and compared: float32 if the file has it, else float64."""
    import polars as pl

    schema = schema_of(file)
    return {
        column: pl.Float32 if schema[column] == pl.Float32 else pl.Float64 for column in columns if column in schema
    }


def present_name(column: str, names: list[str], file: str) -> str:
    for name in COLUMN_NAMES.get(column, (column,)):
        if name in names:
            return name
    raise UserError(
        f"{file}: no column {' or '.join(COLUMN_NAMES.get(column, (column,)))}{hint(column, names)}; "
        f"it has {', '.join(names)}."
    )


def read_scores(
    files: list[str], columns: list[str], high: np.ndarray, low: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Returns the score columns for the given ids, NaN for a missing score, and the number of scores per column that
    are left out because an earlier row gives the same id a different score."""
    import polars as pl

    if not columns:
        return {}, {}
    if not files:
        raise UserError(
            f"expression: the metadata has no column {', '.join(columns)}; pass --scores with parquet files of it."
        )
    kinds = {column: kind for file in reversed(files) for column, kind in score_kinds(file, columns).items()}
    scores: dict[str, np.ndarray] = {
        column: np.full(len(high), np.nan, np.float32 if kinds.get(column) == pl.Float32 else np.float64)
        for column in columns
    }
    missing, conflicts = set(columns), dict.fromkeys(columns, 0)
    for batch in batches(files):
        schema = schema_of(batch[0])
        present = [column for column in columns if column in schema]
        missing -= set(present)
        if not present:
            continue
        selected = id_columns(schema, batch[0])[:2]
        selected += [pl.col(column).cast(kinds[column], strict=False) for column in present]
        lazy = pl.scan_parquet(batch, missing_columns="insert", extra_columns="ignore").select(selected)
        frame = collect(lazy.drop_nulls(["high", "low"]), batch).sort("high", "low", maintain_order=True)
        if not len(frame):
            continue
        ids = UidSet(frame["high"].to_numpy(), frame["low"].to_numpy())
        position = ids.find(high, low)
        first = np.maximum(ids.find(ids.high, ids.low), 0)
        for column in present:
            values = frame[column].fill_null(float("nan")).to_numpy()
            conflicts[column] += num_different(values[first], values)
            conflicts[column] += num_different(scores[column], np.where(position >= 0, values[position], np.nan))
            is_new = (position >= 0) & np.isnan(scores[column])
            scores[column][is_new] = values[position[is_new]]
    if missing:
        present = ", ".join(schema_of(files[0]))
        raise UserError(f"--scores: no file has the column {', '.join(sorted(missing))}; the first has {present}.")
    return scores, {column: number for column, number in conflicts.items() if number}


def num_different(first: np.ndarray, second: np.ndarray) -> int:
    """Counts the pairs of different numbers; a pair with NaN does not count."""
    return int(((first != second) & ~np.isnan(first) & ~np.isnan(second)).sum())


def is_language(texts: Any, arguments: str, test: LanguageTest) -> Any:
    """Returns which texts (a Polars series) are most likely in a language: "en", or "en, 0.5" with a least probability.
    Each distinct text is tested once."""
    import polars as pl

    language, _, probability = arguments.partition(",")
    different = texts.drop_nulls().unique()
    matches = test(language.strip(), float(probability or 0), different.to_list())
    return texts.is_in(different.filter(pl.Series(matches, dtype=pl.Boolean)).implode()).fill_null(False)
