"""The guide to hooks names every role that a hook point of any architecture has."""

import re
from pathlib import Path

import models
from models.registry import ARCHITECTURES, ENCODERS

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "hooks.md"


def test_every_role_stands_in_the_guide() -> None:
    models.list_models()  # registers all
    named = set(re.findall(r"`([a-z_]+)`", GUIDE.read_text(encoding="utf-8")))
    missing: dict[str, list[str]] = {}
    for name in [*ARCHITECTURES, *ENCODERS]:
        for role in models.build(name).hook_points.roles:
            if role not in named and not role.startswith("source_"):
                missing.setdefault(role, []).append(name)
    assert not missing
