"""What one cached activation costs in memory, and what an import costs in time.

    python -m tests.benchmarks --only memory

A model of GPT-2 small's shape (12 layers, width 768, 12 heads; vocabulary 5,000) reads 2,048 tokens in a fresh process, and the highest
resident memory above the loaded model is read from the system. Nothing between scores and output is asked for, so no 2,048 x 2,048
pattern should ever exist: 12 of them would take 200 MB in every layer.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import Row

ROOT = Path(__file__).resolve().parents[2]
TOKENS, LAYERS = 2048, 12
GOAL_MB = 320
WASTE = "waste = torch.ones(64 * 2**20 // 4)"

MEASURE = """
import json
from pathlib import Path
import torch
torch.set_num_threads(1)
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig

def resident(line):  # in MB; VmRSS is what is held now, VmHWM the most since it was last forgotten
    return next(int(l.split()[1]) / 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(line))

config = LanguageModelConfig({layers}, 768, 5000, 2048, AttentionConfig(12), MLPConfig(3072), tie_embeddings=True)
model = LanguageModel(config).eval()
tokens = torch.randint(0, 5000, (1, {tokens}), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    model(tokens[:, :8])
    start = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    except OSError:
        start = resident("VmHWM")  # not allowed here: then the peak of loading is the level
    {extra}
    result = {call}
print(json.dumps(resident("VmHWM") - start))
"""

CALLS = {
    "forward": "model(tokens)",
    "cache one residual stream": "model.run_with_cache(tokens, names='blocks.0.hook_resid_post')",
    "cache one pattern row of every head": "model.run_with_cache(tokens, role='pattern', positions=[-1])",
}


def in_fresh_process(code: str) -> float:
    """The number that a program prints last."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_above_model(
    call: str = CALLS["forward"], tokens: int = TOKENS, layers: int = LAYERS, extra: str = ""
) -> float:
    """MB of resident memory that a call adds at its highest, above the loaded model. The logits are part of it."""
    return in_fresh_process(MEASURE.format(call=call, tokens=tokens, layers=layers, extra=extra))


def import_seconds(statement: str) -> float:
    """CPU seconds that a fresh interpreter spends on an import; median of three."""
    code = (
        f"import json, time; start = time.process_time(); {statement}; print(json.dumps(time.process_time() - start))"
    )
    return statistics.median(in_fresh_process(code) for _ in range(3))


def run() -> list[Row]:
    peaks = {name: peak_above_model(call) for name, call in CALLS.items()}
    rows = [
        Row(
            f"{name}, 12x768 at 2,048 tokens: peak above the model / {GOAL_MB} MB",
            peak / GOAL_MB,
            1.0 if name == "cache one residual stream" else None,
            unit="bytes",
            note=f"{peak:.0f} MB, of which 39 MB are the logits",
        )
        for name, peak in peaks.items()
    ]
    torch_alone, ours, lens = (
        import_seconds(f"import {name}") for name in ("torch", "torch, workbench, models, probes", "transformer_lens")
    )
    return [
        *rows,
        Row(
            "import workbench, models, probes / import torch",
            ours / torch_alone,
            1.0 + 0.5 / torch_alone,
            note=f"{ours:.2f} s and {torch_alone:.2f} s; transformer_lens takes {lens:.2f} s",
        ),
    ]
