"""Parses expressions over rules: clip_l14_top(0.3) & basic | mlm(semantic_understanding >= 85) | uids(dfn.npy)

expression   term, term | term (union), term - term (difference); left to right
term         factor & factor (intersection); binds tighter
factor       rule, rule(arguments), (expression)
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from oq2vl_jax.errors import UserError

Value = TypeVar("Value")
TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<mark>[&|()-]))")


@dataclass(frozen=True)
class Leaf:
    """A rule as written: name(arguments). arguments is "" if there are no parentheses."""

    name: str
    arguments: str = ""

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})" if self.arguments else self.name


@dataclass(frozen=True)
class Combination:
    operator: str
    """& intersection, | union, - difference."""
    left: "Leaf | Combination"
    right: "Leaf | Combination"


Expression = Leaf | Combination


def parse(text: str) -> Expression:
    """Parses an expression. Raises UserError with the position of a mistake."""
    try:
        return _Parser(text).parse()
    except RecursionError as error:
        raise UserError("expression: nested too deeply.") from error


def leaves(expression: Expression) -> Iterator[Leaf]:
    """Returns the rules of an expression from left to right, each once."""
    seen: dict[Leaf, None] = {}

    def visit(node: Expression) -> None:
        if isinstance(node, Leaf):
            seen.setdefault(node)
        else:
            visit(node.left)
            visit(node.right)

    visit(expression)
    return iter(seen)


def takes_away(expression: Expression) -> set[Leaf]:
    """Returns the rules behind a difference (-): samples for which they are true are left out."""
    if isinstance(expression, Leaf):
        return set()
    left, right = takes_away(expression.left), takes_away(expression.right)
    return left | set(leaves(expression.right)) - right if expression.operator == "-" else left | right


def evaluate(expression: Expression, value_of: Callable[[Leaf], Value]) -> Value:
    """Combines the values of the rules with &, | and & ~ (boolean arrays, columns, ...)."""
    if isinstance(expression, Leaf):
        return value_of(expression)
    left, right = evaluate(expression.left, value_of), evaluate(expression.right, value_of)
    if expression.operator == "&":
        return left & right  # pyright: ignore[reportOperatorIssue]
    return left | right if expression.operator == "|" else left & ~right  # pyright: ignore[reportOperatorIssue]


class _Parser:
    def __init__(self, text: str):
        self.text, self.position = text, 0

    def parse(self) -> Expression:
        expression = self.union()
        if self.text[self.position :].strip():
            raise self.mistake("expected &, | or -")
        return expression

    def union(self) -> Expression:
        expression = self.intersection()
        while mark := self.take("|", "-"):
            expression = Combination(mark, expression, self.intersection())
        return expression

    def intersection(self) -> Expression:
        expression = self.factor()
        while self.take("&"):
            expression = Combination("&", expression, self.factor())
        return expression

    def factor(self) -> Expression:
        if self.take("("):
            expression = self.union()
            if not self.take(")"):
                raise self.mistake("a parenthesis is not closed: expected )")
            return expression
        match = TOKEN.match(self.text, self.position)
        if not match or not match["name"]:
            raise self.mistake("expected a rule")
        self.position = match.end()
        return Leaf(match["name"], self.arguments())

    def arguments(self) -> str:
        """Returns the text between the parentheses as written; make_rule parses paths and comparisons."""
        if not self.take("("):
            return ""
        end = self.text.find(")", self.position)
        if end < 0:
            raise self.mistake("a parenthesis is not closed: expected )")
        arguments, self.position = self.text[self.position : end].strip(), end + 1
        return arguments

    def take(self, *marks: str) -> str | None:
        match = TOKEN.match(self.text, self.position)
        if match and match["mark"] in marks:
            self.position = match.end()
            return match["mark"]
        return None

    def mistake(self, problem: str) -> UserError:
        position = self.position + len(self.text[self.position :]) - len(self.text[self.position :].lstrip())
        return UserError(f"expression: {problem} at character {position + 1} of {self.text!r}.")
