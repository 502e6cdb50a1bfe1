"""The language of filter expressions, against Python sets, and what its mistakes say."""

import itertools
import random

import pytest

from oq2vl_jax.curate.filter.expression import Leaf, evaluate, leaves, parse, takes_away
from oq2vl_jax.curate.filter.rules import make_rule
from oq2vl_jax.errors import UserError

UNIVERSE = range(8)
SETS = {name: {x for x in UNIVERSE if x >> bit & 1} for bit, name in enumerate("abc")}


class Members(set):
    """Sets that know a complement, as boolean columns do."""

    def __and__(self, other):
        return Members(set(self) & set(other))

    def __or__(self, other):
        return Members(set(self) | set(other))

    def __invert__(self):
        return Members(set(UNIVERSE) - self)


def random_expression(rng, depth):
    """(text, its members): built together, so that the text is never parsed by the reference."""
    if depth == 0:
        name = rng.choice("abc")
        return name, SETS[name]
    (left, in_left), (right, in_right) = (random_expression(rng, depth - 1) for _ in range(2))
    mark = rng.choice("&|-")
    members = {"&": in_left & in_right, "|": in_left | in_right, "-": in_left - in_right}[mark]
    return f"({left}) {mark} ({right})", members


@pytest.mark.parametrize("seed", range(20))
def test_expressions_with_parentheses_are_those_of_sets(seed):
    text, expected = random_expression(random.Random(seed), depth=3)
    assert evaluate(parse(text), lambda leaf: Members(SETS[leaf.name])) == expected


def test_intersection_binds_tighter_and_the_rest_goes_from_left_to_right():
    a, b, c = (SETS[name] for name in "abc")
    expected = {"a | b & c": a | b & c, "a & b | c": a & b | c, "a - b | c": (a - b) | c, "a - b - c": (a - b) - c,
                "a-b&c": a - (b & c)}  # fmt: skip
    for text, members in expected.items():
        assert evaluate(parse(text), lambda leaf: Members(SETS[leaf.name])) == members, text


def test_what_takes_away_is_told_from_what_keeps():
    expected = {"a - b": {"b"}, "a - (b | c)": {"b", "c"}, "a & b": set(), "a - (b - c)": {"b"}, "(a - b) | c": {"b"}}
    assert {text: {leaf.name for leaf in takes_away(parse(text))} for text in expected} == expected


def test_rules_keep_their_arguments_as_written():
    text = "clip_l14_top(0.3) & basic | mlm(semantic_understanding >= 85) | uids(sets/dfn-medium.npy)"
    assert [str(leaf) for leaf in leaves(parse(text))] == [
        "clip_l14_top(0.3)", "basic", "mlm(semantic_understanding >= 85)", "uids(sets/dfn-medium.npy)",
    ]  # fmt: skip
    assert list(leaves(parse("a & a | b"))) == [Leaf("a"), Leaf("b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a rule at character 1"),
        ("a &", "expected a rule at character 4"),
        ("a b", r"expected &, \| or - at character 3"),
        ("(a | b", r"not closed: expected \) at character 7"),
        ("a(1", "not closed"),
        ("a | | b", "expected a rule at character 5"),
        ("a ! b", r"expected &, \| or -"),
    ],
)
def test_mistakes_are_named_with_their_place(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_l41_top(0.3)", r"no such rule \(did you mean 'clip_l14_top'"),
        ("clip_l14(0.3)", r"something like clip_l14\(>= 0.28\)"),
        ("clip_top(1.5)", "above 0 and at most 1"),
        ("mlm(semantic_understandin >= 85)", "did you mean 'semantic_understanding'"),
        ("mlm_top(0.2)", "expected a column and a fraction"),
        ("language(english)", "language code"),
        ("uids()", "expected a file"),
        ("words(three)", "something like"),
    ],
)
def test_rules_that_do_not_exist_or_fit_are_explained(text, message):
    (leaf,) = leaves(parse(text))
    with pytest.raises(UserError, match=message):
        make_rule(leaf)


def test_every_pair_of_operators_parses():
    for first, second in itertools.product("&|-", repeat=2):
        assert len(list(leaves(parse(f"a {first} b {second} c")))) == 3
