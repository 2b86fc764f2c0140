"""`claims.toml`: what is read, and that every mistake is named with its file, claim and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from case_studies.harness.claims import read_study
from case_studies.harness.discovery import find_study, list_studies, study_problems
from case_studies.harness.errors import ClaimsError, UnknownStudy
from tests.case_studies.planted import CLAIM, CLAIMS, STUDY, write_study


def test_what_is_read(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    (claim,) = study.claims
    assert (study.name, study.title, study.paper, list(study.tiers)) == (
        "planted",
        "Planted",
        "icl-linear-gf",
        ["smoke", "small"],
    )
    assert (claim.measurement, claim.tier, claim.seeds, claim.published_number) == ("number", "small", 3, 0.75)
    assert study.tier("small").settings == {"offset": 0.0} and study.readme == "# Planted\n"


def test_defaults(tmp_path: Path) -> None:
    plain = CLAIM.replace('measurement = "number"\n', "").replace("0.75", '"about three quarters"')
    (claim,) = read_study(write_study(tmp_path, claims=CLAIMS + plain)).claims
    assert claim.measurement == "above_half" and claim.paper == "icl-linear-gf" and claim.published_number is None


def changed(old: str, new: str, text: str = CLAIMS + CLAIM) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    "claims,words",
    [
        (changed('title = "Planted"', 'titel = "Planted"'), r"planted/claims.toml: there is no field 'titel'.*Did you mean 'title'"),
        (changed('title = "Planted"', ""), r"planted/claims.toml: the field 'title' is missing"),
        (changed('title = "Planted"', 'title = ""'), r"field 'title' is '', expected words"),
        (changed('"icl-linear-gf"', '"icl-liner-gf"'), r"field 'paper': No paper.*'icl-liner-gf'.*Did you mean 'icl-linear-gf'"),
        (changed("[tiers.small]", "[tiers.smal]"), r"there is no tier 'smal'.*Did you mean 'small'"),
        (changed("seeds = 3", "seeds = 0"), r"tier small: field 'seeds' is 0"),
        (changed("seeds = 3", "seeds = true"), r"tier small: field 'seeds' is True"),
        (changed("minutes = 0.1", "minutes = -1"), r"tier small: field 'minutes' is -1"),
        (changed("minutes = 0.1", "minute = 1"), r"tier small: there is no field 'minute'.*Did you mean 'minutes'"),
        (changed('published = 0.75', ""), r"claim 'above-half': the field 'published' is missing"),
        (changed('published = 0.75', "published = true"), r"claim 'above-half': field 'published' is True"),
        (changed('sentence =', "sentense ="), r"claim 'above-half': there is no field 'sentense'.*Did you mean 'sentence'"),
        (changed('id = "above-half"', ""), r"claim number 1: the field 'id' is missing"),
        (changed('"above-half"', '"Above half"'), r"field 'id' is 'Above half'"),
        (changed('"closed form"', '"closed-form"'), r"'evidence' is 'closed-form', expected one of .*Did you mean 'closed form'"),
        (changed('"ci_low > 0.5"', '"ci_lo > 0.5"'), r"claim 'above-half': field 'rule': .*Did you mean 'ci_low'"),
        (changed('"ci_low > 0.5"', '"function meassure"'), r"function 'meassure', which study.py does not define.*'measure'"),
        (changed("published = 0.75", 'published = "much"').replace("ci_low > 0.5", "value > published"), r"uses the published value"),
        (CLAIMS + CLAIM + 'tier = "full"\n', r"decided at tier 'full', which the study does not have; it has: smoke, small"),
        (CLAIMS + CLAIM + 'tier = "ful"\n', r"field 'tier' is 'ful', expected one of smoke, small, full"),
        (CLAIMS + CLAIM + 'interval = "boot"\n', r"field 'interval' is 'boot'.*bootstrap"),
        (CLAIMS + CLAIM + "seeds = 1.5\n", r"field 'seeds' is 1.5"),
        (CLAIMS + CLAIM + 'paper = "nothing"\n', r"claim 'above-half': field 'paper': No paper"),
        (CLAIMS + CLAIM + CLAIM, r"two claims have the id 'above-half'"),
        (CLAIMS, r"the field 'claims' is missing"),
        (CLAIMS.replace("[tiers", "claims = []\n[tiers", 1), r"field 'claims' holds no claim"),
        ("title = ", r"planted/claims.toml is not valid TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, claims: str, words: str) -> None:
    with pytest.raises(ClaimsError, match=words) as error:
        read_study(write_study(tmp_path, claims=claims))
    assert "planted" in str(error.value)


def test_a_study_needs_its_three_files_and_a_function(tmp_path: Path) -> None:
    folder = write_study(tmp_path, study="def walk(context):\n    return {}\n")
    with pytest.raises(ClaimsError, match=r"planted/study.py defines no function run"):
        read_study(folder)
    (folder / "study.py").write_text("def run(context:\n")
    with pytest.raises(ClaimsError, match=r"planted/study.py, line 1"):
        read_study(folder)
    (folder / "study.py").write_text(STUDY)
    (folder / "README.md").unlink()
    with pytest.raises(ClaimsError, match=r"planted: a study needs a file README.md"):
        read_study(folder)
    with pytest.raises(ClaimsError, match="named in lower-case words"):
        read_study(write_study(tmp_path, name="Bad-Name"))


def test_studies_are_found_by_folder(tmp_path: Path) -> None:
    write_study(tmp_path, "first_study")
    write_study(tmp_path, "second", claims="title = ")
    (tmp_path / "no_study").mkdir()
    assert [study.name for study in list_studies(tmp_path)] == ["first_study"]
    (problem,) = study_problems(tmp_path)
    assert problem.folder == "second" and "not valid TOML" in problem.reason
    assert (
        find_study("first-study", tmp_path)
        == find_study("first_study", tmp_path)
        == find_study(tmp_path / "first_study")
    )
    with pytest.raises(UnknownStudy, match=r"no study 'frist_study'\. Did you mean 'first_study'"):
        find_study("frist_study", tmp_path)
    with pytest.raises(UnknownStudy, match=r"There are: first_study, second"):
        find_study("zzz", tmp_path)
    with pytest.raises(UnknownStudy, match=r"holds no claims\.toml"):
        find_study(tmp_path / "no_study")


def test_every_study_here_can_be_read() -> None:
    assert study_problems() == []
    assert "linear_attention_regression" in [study.name for study in list_studies()]


def test_the_catalogue_knows_the_studies() -> None:
    from app.coverage import all_declarations

    declared = {(each.slug, each.name) for each in all_declarations() if each.kind == "case_study"}
    assert {(slug, study.name) for study in list_studies() for slug in study.papers} <= declared
