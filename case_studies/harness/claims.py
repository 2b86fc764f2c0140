"""Reading `claims.toml`: what a study claims to decide, checked field by field.

    title = "Linear attention learns regression"
    summary = "One sentence on what is measured."
    paper = "icl-linear-gf"                   # slug of the catalogue; a claim may name another

    [tiers.smoke]                             # smoke, small and full, whichever the study has
    seeds = 1
    minutes = 0.3                             # about, on one core
    settings = { steps = 100 }                # whatever study.py reads from context.settings

    [[claims]]
    id = "risk-optimal"
    sentence = "What the paper says, in our words."
    where = "Theorem 4.1"
    published = 1.1345                        # a number or words
    source = "the paper's formula, evaluated"
    evidence = "closed form"
    rule = "ci_high < 1.01"                   # see rules.py
    measurement = "risk_ratio"                # key of what study.py returns; the id with _ if left out
    tier = "small"                            # the smallest tier that decides the claim; small if left out
    seeds = 3                                 # fewest seeds that decide it; 3 if left out
    interval = "t"                            # or "bootstrap"; left out: t over seeds, bootstrap over items
    paper = "…"                               # only if it is not the study's
    unit = "nats"
    note = "What differs from the paper."

Every mistake is a ClaimsError that names the file, the claim and the field, with the nearest right name.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from case_studies.harness.errors import ClaimsError
from case_studies.harness.evidence import INTERVALS
from case_studies.harness.rules import DecidedByFunction, Rule, RuleError, read_rule
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import UnknownPaper, paper

TIERS = ("smoke", "small", "full")
"""How much is run: `smoke` checks that everything works, in seconds; `small` decides claims in minutes on one processor
core; `full` is the paper's own setting, which may need its models, its data or a large machine."""

EVIDENCE = {
    "published data": "the authors' released results, analysed again",
    "closed form": "a theorem or a planted truth, which gives the exact answer",
    "trained here": "a model that this project trained",
    "published model": "a model that others trained and released",
}
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
CLAIM_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, its published value and the source of that, and the rule that decides it."""

    id: str
    sentence: str
    where: str
    published: float | str
    source: str
    evidence: str
    rule: str
    measurement: str
    paper: str
    tier: str = "small"
    seeds: int = 3
    interval: str | None = None
    unit: str = ""
    note: str = ""

    @cached_property
    def decision(self) -> Rule:
        return read_rule(self.rule)

    @property
    def published_number(self) -> float | None:
        return float(self.published) if isinstance(self.published, (int, float)) else None


@dataclass(frozen=True)
class Tier:
    """How one tier is run: number of seeds when none is asked for, about how long, and the settings of the study."""

    name: str
    seeds: int = 1
    minutes: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Study:
    """One study as its folder describes it; reading it runs none of its code."""

    name: str
    folder: Path
    title: str
    summary: str
    paper: str
    tiers: Mapping[str, Tier]
    claims: tuple[Claim, ...]

    @property
    def papers(self) -> list[str]:
        """Slugs of all papers that the study or one of its claims names."""
        return list(dict.fromkeys([self.paper, *(claim.paper for claim in self.claims)]))

    @property
    def readme(self) -> str:
        """The study's text, Markdown."""
        return (self.folder / "README.md").read_text(encoding="utf-8")

    def tier(self, name: str) -> Tier:
        """ClaimsError, naming those there are, when the study has no such tier."""
        if name not in self.tiers:
            has = ", ".join(self.tiers)
            raise ClaimsError(f"study {self.name} has no tier {name!r}; it has: {has}.{suggestion(name, self.tiers)}")
        return self.tiers[name]


def read_study(folder: Path) -> Study:
    """The study in a folder with `claims.toml`, `study.py` and `README.md`. ClaimsError says what is wrong with it."""
    folder = Path(folder)
    where = f"{folder.name}/claims.toml"
    if not NAME.fullmatch(folder.name):
        raise ClaimsError(f"{folder.name}: a study's folder is named in lower-case words joined by _")
    for name in ("claims.toml", "study.py", "README.md"):
        if not (folder / name).is_file():
            raise ClaimsError(f"{folder.name}: a study needs a file {name}")
    try:
        table = tomllib.loads((folder / "claims.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClaimsError(f"{where} is not valid TOML: {error}") from error
    _check_fields(
        where, table, ("title", "summary", "paper", "tiers", "claims"), required=("title", "paper", "tiers", "claims")
    )
    slug = _text(where, table, "paper")
    _check_paper(where, slug)
    functions = _functions(folder / "study.py")
    if "run" not in functions:
        raise ClaimsError(f"{folder.name}/study.py defines no function run(context)")
    tiers = _read_tiers(where, table["tiers"])
    records = table["claims"]
    if not isinstance(records, list) or not records or not all(isinstance(each, dict) for each in records):
        raise ClaimsError(f"{where}: field 'claims' holds no claim; each begins with a line [[claims]]")
    claims = tuple(_read_claim(where, position, each, slug, tiers, functions) for position, each in enumerate(records))
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ClaimsError(f"{where}: two claims have the id {name!r}")
    summary = _text(where, table, "summary") if "summary" in table else ""
    return Study(folder.name, folder, _text(where, table, "title"), summary, slug, tiers, claims)


def _read_tiers(where: str, table: Any) -> dict[str, Tier]:
    if not isinstance(table, dict) or not table:
        raise ClaimsError(f"{where}: field 'tiers' holds no tier; expected sections [tiers.{'], [tiers.'.join(TIERS)}]")
    tiers = {}
    for name in table:
        if name not in TIERS:
            raise ClaimsError(
                f"{where}: there is no tier {name!r}; tiers: {', '.join(TIERS)}.{suggestion(name, TIERS)}"
            )
    for name in (name for name in TIERS if name in table):
        at, given = f"{where}, tier {name}", table[name]
        if not isinstance(given, dict):
            raise ClaimsError(f"{at}: expected a section [tiers.{name}]")
        _check_fields(at, given, ("seeds", "minutes", "settings", "note"))
        seeds, minutes, settings = given.get("seeds", 1), given.get("minutes"), given.get("settings", {})
        if type(seeds) is not int or seeds < 1:
            raise ClaimsError(f"{at}: field 'seeds' is {seeds!r}, expected a whole number from 1")
        if minutes is not None and (type(minutes) not in (int, float) or minutes <= 0):
            raise ClaimsError(f"{at}: field 'minutes' is {minutes!r}, expected a number above 0")
        if not isinstance(settings, dict):
            raise ClaimsError(f"{at}: field 'settings' is not a table of names and values")
        tiers[name] = Tier(name, seeds, minutes, settings, _text(at, given, "note") if "note" in given else "")
    return tiers


def _read_claim(
    where: str, position: int, record: dict[str, Any], slug: str, tiers: Mapping[str, Tier], functions: Iterable[str]
) -> Claim:
    name = record.get("id")
    at = f"{where}, claim {name!r}" if isinstance(name, str) else f"{where}, claim number {position + 1}"
    known = [each.name for each in fields(Claim)]
    required = [
        each.name for each in fields(Claim) if each.default is MISSING and each.name not in ("measurement", "paper")
    ]
    _check_fields(at, record, known, required)
    if not isinstance(name, str) or not CLAIM_ID.fullmatch(name):
        raise ClaimsError(f"{at}: field 'id' is {name!r}, expected lower-case words joined by -")
    for each in ("sentence", "where", "source", "rule", "measurement", "unit", "note"):
        if each in record:
            _text(at, record, each, may_be_empty=each in ("unit", "note"))
    if type(record["published"]) not in (int, float, str) or record["published"] == "":
        raise ClaimsError(f"{at}: field 'published' is {record['published']!r}, expected a number or words")
    for each, choices in (("evidence", EVIDENCE), ("tier", TIERS), ("interval", INTERVALS)):
        if each in record and record[each] not in choices:
            near = suggestion(str(record[each]), choices)
            raise ClaimsError(f"{at}: field {each!r} is {record[each]!r}, expected one of {', '.join(choices)}.{near}")
    seeds = record.get("seeds", 3)
    if type(seeds) is not int or seeds < 1:
        raise ClaimsError(f"{at}: field 'seeds' is {seeds!r}, expected a whole number from 1")
    if "paper" in record:
        _check_paper(at, _text(at, record, "paper"))
    claim = Claim(**{"measurement": name.replace("-", "_"), "paper": slug, **record})
    _check_rule(at, claim, functions)
    if claim.tier not in tiers:
        raise ClaimsError(
            f"{at}: it is decided at tier {claim.tier!r}, which the study does not have; it has: {', '.join(tiers)}"
        )
    return claim


def _check_rule(at: str, claim: Claim, functions: Iterable[str]) -> None:
    try:
        rule = claim.decision
    except RuleError as error:
        raise ClaimsError(f"{at}: field 'rule': {error}") from error
    if isinstance(rule, DecidedByFunction):
        if rule.function not in functions:
            near = suggestion(rule.function, functions)
            raise ClaimsError(
                f"{at}: field 'rule' names the function {rule.function!r}, which study.py does not define.{near}"
            )
    elif "published" in rule.names and claim.published_number is None:
        raise ClaimsError(f"{at}: field 'rule' uses the published value, which is words: {claim.published!r}")


def _functions(file: Path) -> list[str]:
    """Names of the functions that a file defines at its top level, found by reading it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except SyntaxError as error:
        raise ClaimsError(f"{file.parent.name}/study.py, line {error.lineno}: {error.msg}") from error
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def _check_fields(at: str, table: Mapping[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    known = list(known)
    for name in table:
        if name not in known:
            near = suggestion(name, known)
            raise ClaimsError(f"{at}: there is no field {name!r}; fields: {', '.join(known)}.{near}")
    for name in required:
        if name not in table:
            raise ClaimsError(f"{at}: the field {name!r} is missing")


def _check_paper(at: str, slug: str) -> None:
    try:
        paper(slug)
    except UnknownPaper as error:
        raise ClaimsError(f"{at}: field 'paper': {error}") from None


def _text(at: str, table: Mapping[str, Any], name: str, may_be_empty: bool = False) -> str:
    value = table[name]
    if not isinstance(value, str) or (not value.strip() and not may_be_empty):
        raise ClaimsError(f"{at}: field {name!r} is {value!r}, expected words")
    return value
