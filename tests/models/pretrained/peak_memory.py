"""The highest resident memory of opening a checkpoint, measured in a fresh process. Linux only."""

import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = """
from models.pretrained.family import families
from models.pretrained.loader import load_folder
from models.registry import architecture
architecture("gpt2"), families()  # code is not weights

def load(folder):
    return load_folder(folder, architecture, dtype=None if sys.argv[2] == "float32" else sys.argv[2])
"""
THEIRS = """
import transformers
transformers.GPT2LMHeadModel, transformers.LlamaForCausalLM

def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if sys.argv[2] == "float32" else "auto")
"""
MEASURE = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
{load}
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = status("VmRSS")
model = load(Path(sys.argv[1]))
print(status("VmHWM") - before)
"""


def write_large(kind: str, stored: str, folder: Path, layers: int = 4, shard: str = "10GB") -> int:
    """A checkpoint of width 768 with random weights, by transformers; the bytes of its weights in float32."""
    import torch
    import transformers

    if kind == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=4000, n_embd=768, n_layer=layers, n_head=12)
        theirs: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=4000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12
        )
        theirs = transformers.LlamaForCausalLM(config)
    theirs.to(getattr(torch, stored)).save_pretrained(folder, max_shard_size=shard)
    return 4 * sum(parameter.numel() for parameter in theirs.parameters())


def peak_of_loading(folder: Path, dtype: str = "float32", load: str = OURS) -> int:
    """Bytes above what the process held before it opened the checkpoint as `dtype` ("float32" or "auto")."""
    program = MEASURE.format(load=load)
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder), dtype], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return int(run.stdout.split()[-1])
