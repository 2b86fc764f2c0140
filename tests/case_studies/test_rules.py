"""The language of rules: what holds, what does not, and what is refused in words."""

from __future__ import annotations

import pytest

from case_studies.harness.rules import Comparison, DecidedByFunction, RuleError, read_rule

STATISTICS = {
    "value": 0.7, "median": 0.71, "lowest": 0.6, "highest": 0.8, "ci_low": 0.55, "ci_high": 0.85, "n": 5.0, "published": 0.75,
}  # fmt: skip


def holds(text: str, **changes: float) -> bool:
    rule = read_rule(text)
    assert isinstance(rule, Comparison)
    return rule.holds({**STATISTICS, **changes})


@pytest.mark.parametrize(
    "text,expected",
    [
        ("ci_low > 0.5", True), ("ci_low > 0.55", False), ("ci_low >= 0.55", True), ("0.5 < value < 0.7", False),
        ("0.5 < value <= 0.7", True), ("abs(value - published) <= 0.0501", True), ("abs(value - published) <= 0.049", False),
        ("value > 0.5 and lowest > 0.65", False), ("value > 0.9 or lowest >= 0.6", True), ("not value > 0.9", True),
        ("value / published > 0.9", True), ("-value < 0", True), ("highest - lowest < 2 * 0.11", True), ("n >= 5 and value != 0", True),
        ("ci_low <= published <= ci_high", True), ("value == 0.7", True), ("value > 1e-3", True),
    ],
)  # fmt: skip
def test_conditions(text: str, expected: bool) -> None:
    assert holds(text) is expected


def test_a_boundary_belongs_to_the_rule_as_written() -> None:
    assert holds("value > 0.7") is False and holds("value >= 0.7") is True


def test_every_seed() -> None:
    rule = read_rule("value > 0  in every   seed ")
    assert isinstance(rule, Comparison) and rule.every_seed and rule.names == ("value",)
    assert not isinstance(read_rule("value > 0"), DecidedByFunction) and not read_rule("value > 0").every_seed


def test_a_function() -> None:
    rule = read_rule("function heads_agree")
    assert isinstance(rule, DecidedByFunction) and rule.function == "heads_agree" and not rule.needs_interval


@pytest.mark.parametrize(
    "text,needs", [("ci_low > 0", True), ("value > 0 and ci_high < 1", True), ("value > 0", False)]
)
def test_which_rules_need_an_interval(text: str, needs: bool) -> None:
    assert read_rule(text).needs_interval is needs


@pytest.mark.parametrize(
    "text,words",
    [
        ("ci_lo > 0.5", "no statistic 'ci_lo'.*Did you mean 'ci_low'"),
        ("median > 0 in every seed", "no statistic 'median'; with 'in every seed' a rule knows value, published"),
        ("value >", "is not a rule such as"),
        ("", "is not a rule such as"),
        ("value", "compares nothing"),
        ("value + 1", "compares nothing"),
        ("published > 0", "says nothing about what was measured"),
        ("1 < 2", "says nothing about what was measured"),
        ("__import__('os').system('true') > value", "not part of the language"),
        ("value.real > 0", "not part of the language"),
        ("value > 'a'", "not part of the language"),
        ("value > True", "not part of the language"),
        ("value in (1, 2)", "not part of the language"),
        ("value is 1", "not part of the language"),
        ("abs(value, 1) > 0", "not part of the language"),
        ("abs(x=value) > 0", "not part of the language"),
        ("max(value, 1) > 0", "not part of the language"),
        ("value ** 2 > 0", "not part of the language"),
        ("[value > 0 for value in ci_low]", "not part of the language"),
        ("(lambda: value)() > 0", "not part of the language"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(RuleError, match=words):
        read_rule(text)


def test_division_by_zero_and_a_missing_statistic() -> None:
    with pytest.raises(RuleError, match="divides by zero"):
        holds("1 / (value - value) > 0")
    rule = read_rule("ci_low > 0")
    assert isinstance(rule, Comparison)
    with pytest.raises(RuleError, match="has no ci_low"):
        rule.holds({"value": 1.0})
