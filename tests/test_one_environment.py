"""transformer-lens, transformers and we live in one process: each imported, each at work on one model."""

import subprocess
import sys

PROGRAM = """
import torch
torch.set_num_threads(1)
import transformers, transformer_lens, transformer_lens.patching
import models, probes.heads, workbench
from models.interop.subject import hooked

model = models.build("gpt2")
tokens, other = torch.arange(8)[None], torch.arange(8).flip(0)[None]
cache = model.run_with_cache(tokens)[1]
table = transformer_lens.patching.get_act_patch_resid_pre(model, other, cache, lambda logits: logits[0, -1, 3])
assert table.shape == (3, 8) and table.std() > 0
assert cache.to_transformer_lens(model).decompose_resid(layer=-1).shape[-1] == model.d_model

config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=60, n_positions=32)
subject = hooked(transformers.GPT2LMHeadModel(config))
assert probes.heads.head_scores(subject, tokens, "previous_token")["previous_token"].shape == (2, 4)
print(transformer_lens.__name__, transformers.__version__)
"""


def test_all_three_at_work_in_one_process() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("transformer_lens 5.")
