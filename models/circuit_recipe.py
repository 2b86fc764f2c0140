"""How the shipped induction circuit is trained: `python -m models.circuit_recipe OUT`.

Two layers of attention without MLPs. On repeated random sequences alone, rotary models do learn to retrieve, but at arbitrary
offsets (first layer heads that look three or four tokens back, second layer heads that look correspondingly later): which distance
carries the match is a matter of chance there. English first makes the previous token the natural one, as in language models;
repeated random segments of varied period then turn the previous-token head into half of an induction circuit.
"""

import sys
from pathlib import Path

from models.decoder import Decoder
from models.registry import build
from workbench.lab.batches import TaskBatches, TextBatches
from workbench.lab.tasks import make_task
from workbench.lab.training import TrainingConfig, train

ENGLISH_STEPS, INDUCTION_STEPS = 1500, 4000


def train_circuit(out: Path, progress: object = None) -> Decoder:
    """Both phases, resumable; the second one's folder is `OUT/induction`, whose checkpoint is the shipped model."""
    model = build("attention-only", "circuit")
    english = TextBatches("english", context=256, batch_size=8, validation_windows=32)
    first = TrainingConfig(steps=ENGLISH_STEPS, learning_rate=2e-3, warmup=100, threads=1, eval_every=500)
    train(model, english, first, out / "english", progress=progress)  # type: ignore[arg-type]
    task = make_task("induction", vocab_size=128, length=129)
    second = TrainingConfig(steps=INDUCTION_STEPS, learning_rate=1e-3, warmup=100, threads=1, eval_every=500, seed=1)
    train(model, TaskBatches(task, batch_size=16), second, out / "induction", progress=progress)  # type: ignore[arg-type]
    return model.eval()


if __name__ == "__main__":
    train_circuit(Path(sys.argv[1]))
