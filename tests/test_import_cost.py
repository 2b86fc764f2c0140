"""`import workbench, models, probes` costs no more than `import torch` plus half a second, and loads nothing heavy."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_SECONDS = 0.5
HEAVY = ("transformers", "transformer_lens", "datasets", "dash", "pandas", "sklearn", "scipy")

MEASURE = """
import json, sys, time
before = time.process_time()
{statement}
seconds = time.process_time() - before
print(json.dumps([seconds, [name for name in {heavy!r} if name in sys.modules]]))
"""


# Packages load their names on first use, so `import workbench, models, probes` alone would say little: this statement
# goes on to touch every public name, and what it costs bounds the plain import from above.
EVERY_NAME = """import workbench, models, probes
for package in (workbench, models, probes):
    for name in getattr(package, "__all__", ()):
        getattr(package, name)
"""


def measure(statement: str) -> tuple[float, list[str]]:
    """CPU seconds that a fresh interpreter spends on the statement, and which heavy packages it loaded."""
    code = MEASURE.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, loaded = json.loads(done.stdout.splitlines()[-1])
    return seconds, loaded


def test_the_floors_import_for_torch_plus_half_a_second() -> None:
    torch_seconds, house_seconds = [], []
    for _ in range(3):  # alternating, so that a slow moment of the machine falls on both
        torch_seconds.append(measure("import torch")[0])
        house_seconds.append(measure(EVERY_NAME)[0])
    extra = statistics.median(house_seconds) - statistics.median(torch_seconds)
    assert extra <= ALLOWED_SECONDS, f"{extra:.2f} s more than torch alone"


def test_the_floors_import_nothing_heavy() -> None:
    assert measure(EVERY_NAME)[1] == []


def test_the_measurement_sees_a_heavy_import() -> None:
    busy = "import scipy, time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    seconds, loaded = measure(busy)
    assert seconds >= 0.2 and loaded == ["scipy"]
