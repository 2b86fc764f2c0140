"""`python -m tests.models.attention_page` writes docs/attention-parity.md from attention_parity.toml and the registry."""

import math
from pathlib import Path
from typing import Any

from models.architecture_record import ARCHITECTURES, ENCODERS
from models.attention.config import AttentionConfig
from models.configs import config_to_json
from models.registry import architecture
from tests.models.attention_table import ENTRIES, VERSIONS, WHOLE, Entry

PAGE = Path(__file__).parents[2] / "docs" / "attention-parity.md"
HEADER = """# Attention, memory and depth: what is compared with what

This page is written by `python -m tests.models.attention_page` from `tests/models/attention_parity.toml`; a test compares them, and holds
the list to the registry: a new part without an entry fails.

Each line is a test in `tests/models/`. *Within* is the largest difference that the test allows, relative to the largest entry where that is
above 1; both sides run in float64, and casts to float32 in the reference are made float64 where nothing else is said. Besides, every part
is tested against its equation written out (`test_attention*.py`, `test_memory_transformers.py`, `test_wiring.py`), its gradients against
differences (`test_attention_gradients.py`), and every architecture in the consistency suite.
"""
OPTIONAL = """transformers and scipy are always there. `pip install -c constraints.txt --group parity` brings the others; without them
their tests are skipped."""
PLAIN = {"attention", "mlp", "embedded positions"}  # what says that a site is a site, where nothing else is said
STAGES = {
    "project": "Projections and sharing",
    "position": "Positions",
    "score": "Scores",
    "mask": "Masks",
    "normalise": "From scores to weights",
    "reweight": "Reweighting",
    "mix": "What is added to pattern · values",
    "post": "Behind the heads",
    "memory": "Memory",
    "depth": "Depth",
    "channel mixer": "Channel mixers",
}


def parts_in(config: Any) -> set[str]:
    """Every `kind` in a configuration, those of its position parts, which may have short names, and the names of settings that are in use:
    `"window"`, `"softcap"`, `"embedded positions"`, `"loops"`."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            found.update({value["kind"]} if "kind" in value else ())
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            collect(item)

    collect(config_to_json(config))
    sites = [*getattr(config, "mixers", ()), getattr(config, "encoder_mixer", None)]
    for site in (site for site in sites if isinstance(site, AttentionConfig)):
        found |= {part.kind for part in site.position_parts}
        found |= {name for name in ("window", "softcap") if getattr(site, name) is not None}
        found |= {"embedded positions"} if site.embedded_positions else set()
    return found | ({"loops"} if getattr(config, "loops", 1) > 1 else set())


def users() -> dict[str, set[str]]:
    """The parts (`parts_in`) that the presets of each architecture of attention, memory and depth are made of."""
    architecture("gpt2")  # the first look-up registers all
    return {
        name: set().union(*(parts_in(config) for config in record.presets.values()))
        for name, record in (ARCHITECTURES | ENCODERS).items()
        if record.family in ("attention", "memory", "depth")
    }


def compared(entry: Entry) -> list[str]:
    """Rows of the first table."""
    if entry.alone:
        return [f"| {entry.name} | – | | {entry.alone} | |"]
    return [
        f"| {entry.name} | {one.package}: {one.reference} | {_digits(one.tolerance)} | {one.differs} | `{one.test}` |"
        for one in entry.parities
    ]


def reduced(entry: Entry) -> list[str]:
    """Rows of the second table."""
    return [f"| {entry.name} | {one.words} | `{one.test}` |" for one in entry.reductions]


def _digits(tolerance: float) -> str:
    return f"10{str(round(math.log10(tolerance))).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def page() -> str:
    """The whole page as markdown."""
    lines = [HEADER, "## Architectures", "", "| architecture | as a whole | its parts |", "|---|---|---|"]
    names = {entry.kind or entry.setting: entry.name for entry in ENTRIES if entry.kind or entry.setting}
    for name, own in sorted(users().items()):
        whole = WHOLE.get(name)
        as_whole = f"transformers: `{whole['class']}`, `{whole['test']}`" if whole else ""
        parts = [names[part] for part in names if part in own and (part != "attention" or own <= PLAIN)]
        lines.append(f"| `{name}` | {as_whole} | {'; '.join(parts)} |")
    lines += ["", "## Compared with other code", ""]
    lines += [f"Versions: {', '.join(f'{name} {version}' for name, version in VERSIONS.items())}.", ""]
    lines += [OPTIONAL, ""]
    sections = {stage: [entry for entry in ENTRIES if entry.stage == stage] for stage in STAGES}
    for stage, entries in sections.items():
        lines += [
            f"### {STAGES[stage]}",
            "",
            "| | compared with | within | where it differs, or why there is none | test |",
        ]
        lines += ["|---|---|---|---|---|", *(row for entry in entries for row in compared(entry)), ""]
    lines += ["## What each becomes", "", "| | is, in this case | test |", "|---|---|---|"]
    lines += [row for entries in sections.values() for entry in entries for row in reduced(entry)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
