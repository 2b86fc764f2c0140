"""The rules that decide claims: comparisons of a measurement's statistics, as text in `claims.toml`.

    ci_low > 0.5                          the interval lies above a half
    0.9 <= value <= 1.1                   the mean over seeds lies in a range
    abs(value - published) <= 0.02        the mean is near the published number
    value > 0 in every seed               each seed by itself
    function heads_agree                  a function of study.py decides; see `DecidedByFunction`

Statistics: `value` (mean over seeds), `median`, `lowest`, `highest`, `ci_low`, `ci_high`, `n`, `published`. Operators:
comparisons, `and`, `or`, `not`, `+ - * /`, `abs(…)`. The text is parsed, checked and walked here; nothing is executed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from workbench.instrument.errors import suggestion

STATISTICS = ("value", "median", "lowest", "highest", "ci_low", "ci_high", "n", "published")
PER_SEED_STATISTICS = ("value", "published")
EVERY_SEED = re.compile(r"\s+in\s+every\s+seed\s*$")
BY_FUNCTION = re.compile(r"\s*function\s+(\w+)\s*$")

_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[Any, Any], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


class RuleError(ValueError):
    """A rule that cannot be read, or that asks for what a measurement does not have."""


@dataclass(frozen=True)
class Comparison:
    """A rule that is a condition on statistics. `every_seed`: it must hold for each seed's value by itself."""

    text: str
    condition: ast.expr
    every_seed: bool
    names: tuple[str, ...]

    @property
    def needs_interval(self) -> bool:
        return "ci_low" in self.names or "ci_high" in self.names

    def holds(self, statistics: Mapping[str, float]) -> bool:
        """Whether the condition is true. `statistics` gives a number for each of `names`; RuleError otherwise."""
        return bool(_evaluate(self.condition, statistics))


@dataclass(frozen=True)
class DecidedByFunction:
    """A rule that a function of the study's `study.py` decides.

    It is called with `{measurement: Summary}` and returns a bool, or (bool, reason in words).
    """

    text: str
    function: str
    needs_interval = False
    every_seed = False


Rule = Comparison | DecidedByFunction


def read_rule(text: str) -> Rule:
    """The rule that `text` describes. RuleError says what is wrong with it, naming the nearest statistic."""
    if named := BY_FUNCTION.match(text):
        return DecidedByFunction(text, named[1])
    body = EVERY_SEED.sub("", text)
    every_seed = body != text
    try:
        condition = ast.parse(body.strip(), mode="eval").body
    except SyntaxError as error:
        raise RuleError(f"{text!r} is not a rule such as 'ci_low > 0.5' or 'value > 0 in every seed'") from error
    names: list[str] = []
    _check(condition, PER_SEED_STATISTICS if every_seed else STATISTICS, every_seed, names)
    if not isinstance(condition, (ast.Compare, ast.BoolOp)) and not _is_not(condition):
        raise RuleError(f"{text!r} compares nothing: a rule is a condition such as 'ci_low > 0.5'")
    if not set(names) - {"published", "n"}:
        raise RuleError(f"{text!r} says nothing about what was measured; statistics: {', '.join(STATISTICS)}")
    return Comparison(text, condition, every_seed, tuple(dict.fromkeys(names)))


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _check(node: ast.expr, allowed: tuple[str, ...], every_seed: bool, names: list[str]) -> None:
    """Collect the statistics that an expression names; RuleError for anything that is not part of the language."""
    if isinstance(node, ast.Name):
        if node.id not in allowed:
            where = "with 'in every seed' a rule knows" if every_seed else "statistics:"
            near = suggestion(node.id, allowed)
            raise RuleError(f"there is no statistic {node.id!r}; {where} {', '.join(allowed)}.{near}")
        names.append(node.id)
        return
    number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
    comparison = isinstance(node, ast.Compare) and all(type(each) in _COMPARE for each in node.ops)
    sum_of = isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC
    sign_or_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd, ast.Not))
    absolute = (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "abs"
        and len(node.args) == 1 and not node.keywords
    )  # fmt: skip
    if not (number or comparison or sum_of or sign_or_not or absolute or isinstance(node, ast.BoolOp)):
        raise RuleError(
            f"{ast.unparse(node)!r} is not part of the language of rules: comparisons, and, or, not, + - * /, abs"
        )
    inner = (
        node.args
        if isinstance(node, ast.Call)
        else [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
    )
    for each in inner:
        _check(each, allowed, every_seed, names)


def _evaluate(node: ast.expr, statistics: Mapping[str, float]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in statistics:
            raise RuleError(f"the measurement has no {node.id}")
        return statistics[node.id]
    if isinstance(node, ast.Compare):
        terms = [_evaluate(each, statistics) for each in (node.left, *node.comparators)]
        return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, terms, terms[1:], strict=False))
    if isinstance(node, ast.BoolOp):
        parts = [bool(_evaluate(each, statistics)) for each in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp):
        inner = _evaluate(node.operand, statistics)
        return (not inner) if isinstance(node.op, ast.Not) else -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        try:
            return _ARITHMETIC[type(node.op)](_evaluate(node.left, statistics), _evaluate(node.right, statistics))
        except ZeroDivisionError:
            raise RuleError(f"{ast.unparse(node)!r} divides by zero") from None
    assert isinstance(node, ast.Call)  # `_check` lets nothing else through
    return abs(_evaluate(node.args[0], statistics))
