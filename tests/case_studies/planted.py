"""Planted studies for the tests: folders written on the fly whose numbers are known."""

from __future__ import annotations

from pathlib import Path

CLAIMS = """
title = "Planted"
summary = "A study whose numbers are known."
paper = "icl-linear-gf"

[tiers.smoke]
seeds = 1
settings = { offset = 0.0 }

[tiers.small]
seeds = 3
minutes = 0.1
settings = { offset = 0.0 }
"""

CLAIM = """
[[claims]]
id = "above-half"
sentence = "The number lies above a half."
where = "Table 1"
published = 0.75
source = "Table 1"
evidence = "closed form"
rule = "ci_low > 0.5"
measurement = "number"
"""

STUDY = '''
"""Seeds 0, 1, 2 measure 0.70, 0.75, 0.80."""


def run(context):
    return context.each_seed(measure).measurements()


def measure(context):
    context.progress(0.5, "half way")
    with open(context.folder / "calls", "a") as file:
        file.write("x")
    return {"number": 0.70 + 0.05 * context.seed + context.settings["offset"]}
'''


def write_study(
    root: Path, name: str = "planted", claims: str = CLAIMS + CLAIM, study: str = STUDY, readme: str = "# Planted\n"
) -> Path:
    """A study's folder under `root`."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.toml").write_text(claims, encoding="utf-8")
    (folder / "study.py").write_text(study, encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder
