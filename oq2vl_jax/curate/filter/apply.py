"""Applies a filter file to a pool: thresholds of top fractions, one boolean column per rule, their combination."""

import dataclasses
import tomllib
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.bounds import Between
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.curate.filter.expression import Expression, Leaf, evaluate, leaves, parse
from oq2vl_jax.curate.filter.pool import Pool
from oq2vl_jax.curate.filter.rules import Basic, Rule, make_rule
from oq2vl_jax.data.samples.ids import mixed
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.errors import UserError


@dataclass(frozen=True)
class FilterConfig:
    """Contents of a filter file."""

    expression: str
    basic: Basic = Basic()
    seed: Annotated[int, Between(-(2**63), 2**63 - 1)] = 0


class Selection(NamedTuple):
    """A filter file after reading and checking. rules: every rule that it needs, including those of `basic`."""

    config: FilterConfig
    expression: Expression
    rules: list[Rule]


class Result(NamedTuple):
    """Samples that a filter keeps. kept: bool per sample of the pool. uids: ids of the kept samples, each once. keeps:
    one bool array per rule of the expression and per basic rule. thresholds: the lowest score that each top fraction
    keeps."""

    kept: np.ndarray
    uids: UidSet
    keeps: dict[Leaf, np.ndarray]
    thresholds: dict[Leaf, float]


def load_filter(path: str) -> Selection:
    """Reads and checks a filter file. Raises UserError naming file and key, or the position in the expression."""
    try:
        values = tomllib.loads(paths.read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a TOML file with `expression` is expected.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from error
    basic = values.get("basic", {})
    if not isinstance(basic, dict):
        raise UserError(f"{path}: basic is a table: [basic], then lines such as min_words = 3; got {basic!r}.")
    if basic.get("language") == "":
        values["basic"]["language"] = None  # TOML has no null
    config = from_dict(
        FilterConfig, values | {"basic": dataclasses.asdict(Basic()) | values.get("basic", {})}, where=path
    )
    try:
        expression = parse(config.expression)
        used = [
            leaf for written in leaves(expression) for leaf in (config.basic.leaves if is_basic(written) else [written])
        ]
        return Selection(config, expression, [make_rule(leaf) for leaf in dict.fromkeys(used)])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def is_basic(leaf: Leaf) -> bool:
    if leaf.name == "basic" and leaf.arguments:
        raise UserError("expression: basic takes no arguments; its values stand in the table [basic].")
    return leaf.name == "basic"


def apply_rules(selection: Selection, pool: Pool) -> Result:
    keeps, thresholds = {}, {}
    for rule in selection.rules:
        keep = pool.keeps.get(rule.leaf)
        if rule.top is not None and rule.column:
            keep, thresholds[rule.leaf] = keep_top(rule, pool, selection.config.seed)
        elif rule.column and rule.test:
            keep = rule.test(pool.values.__getitem__)
        assert keep is not None, rule.leaf
        keeps[rule.leaf] = keep & pool.is_valid
    if any(leaf.name == "basic" for leaf in leaves(selection.expression)):
        keeps[Leaf("basic")] = np.logical_and.reduce([keeps[leaf] for leaf in selection.config.basic.leaves])
    kept = evaluate(selection.expression, over_uids(keeps, pool).__getitem__)
    return Result(kept, UidSet(pool.high[kept], pool.low[kept]).unique(), keeps, thresholds)


def keep_top(rule: Rule, pool: Pool, seed: int) -> tuple[np.ndarray, float]:
    """Returns (kept, lowest score kept) for a top fraction; the module docstring of rules.py explains ties."""
    assert rule.column is not None
    assert rule.top is not None
    values = pool.values[rule.column]
    is_scored = ~np.isnan(values) & pool.is_valid
    count, num_scored = number_on_top(rule, len(pool), int(is_scored.sum())), int(is_scored.sum())
    last = min(count, num_scored)
    if not rule.has_exact_top and num_scored:  # DataComp's threshold is the (n + 1)-th highest score
        last = min(count + 1, num_scored)
    if last == 0:
        return np.zeros(len(pool), bool), float("inf")
    threshold = -np.partition(-values[is_scored], last - 1)[last - 1]  # has the dtype of the scores
    keep = is_scored & (values >= threshold)
    if rule.has_exact_top:
        ties = np.flatnonzero(keep & (values == threshold))
        num_too_many = int(keep.sum()) - last
        order = np.argsort(mixed(pool.high[ties] ^ mixed(pool.low[ties] + np.uint64(seed % 2**64))), kind="stable")
        keep[ties[order[len(ties) - num_too_many :]]] = False
    return keep, float(threshold)


def number_on_top(rule: Rule, num_samples: int, num_scored: int) -> int:
    """Returns n of a top fraction. DataComp truncates the float product, so 0.29 of 100 gives 28; ours gives 29."""
    assert rule.top is not None
    if rule.is_of_all and not rule.has_exact_top:
        return int(num_samples * rule.top)
    return int(rule.top * (num_samples if rule.is_of_all else num_scored) + 1e-9)


def over_uids(keeps: dict[Leaf, np.ndarray], pool: Pool) -> dict[Leaf, np.ndarray]:
    """Turns rules about samples into rules about ids. DataComp intersects and unites sets of ids, so a rule keeps an id
    of several rows if it keeps one of these rows. Returns `keeps` unchanged if every id occurs once."""
    rows = rows_of_shared_halves(pool)
    high, low = pool.high[rows], pool.low[rows]
    different = UidSet(high, low).unique()
    if len(different) == len(rows):
        return keeps
    index = different.find(high, low)
    shared = {}
    for leaf, keep in keeps.items():
        has_one = np.zeros(len(different), bool)
        has_one[index[keep[rows]]] = True
        shared[leaf] = keep.copy()
        shared[leaf][rows] = has_one[index]
    return shared


def rows_of_shared_halves(pool: Pool) -> np.ndarray:
    """Returns the rows of valid ids whose high half another valid id has too: all repeated ids are among them, and of
    random ids next to no others."""
    ordered = np.sort(pool.high[pool.is_valid])
    halves = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    return np.flatnonzero(
        UidSet(halves, np.zeros_like(halves)).contains(pool.high, np.zeros_like(pool.high)) & pool.is_valid
    )
