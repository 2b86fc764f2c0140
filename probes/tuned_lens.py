"""The tuned lens: a logit lens that first learns each depth's own coordinates (Belrose et al. 2023, arXiv 2303.08112).

    logits_l = U(LN_final(h_l + A_l h_l + b_l))        A = b = 0 at first: the logit lens

    result = train_tuned_lens(model, TextBatches("english", context=64, batch_size=8), "lens/")
    result.lens.read(model, tokens)                    a LensReading; `result.held_out` and `result.logit_lens` are KLs in nats by depth

A_l and b_l minimise KL(final ‖ lens_l) on text; model, norm and unembedding stay as they are. As in the authors' code A_l is added to the
identity. They use SGD with momentum; here it is Adam with a rate that falls linearly to zero, which needs no tuning per model.

A tuned lens is trained, so it can compute something of its own: compare it with the logit lens, on text that it was not trained on.
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probes.lenses import LensReading, depth_names, logit_lens, residual_streams
from probes.objectives import divergence
from probes.progress import Report
from workbench.lab.batches import Batches
from workbench.lab.checkpoints import read_tensors, write_json, write_tensors
from workbench.lab.training_record import load_checkpoint, save_checkpoint

CHECKPOINT, LENS, RECORD = "checkpoint.safetensors", "lens.safetensors", "lens.json"


class TunedLens(nn.Module):
    """One translator for each depth below the last: A [depth, d_model, d_model] and b [depth, d_model]."""

    def __init__(self, depths: int, d_model: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(depths, d_model, d_model))
        self.b = nn.Parameter(torch.zeros(depths, d_model))

    def forward(self, depth: int, h: Tensor) -> Tensor:
        """h + A_l h + b_l: [batch, pos, d_model] -> same."""
        return h + h @ self.A[depth].T + self.b[depth]

    def read(self, model: Any, tokens: Any, **options: Any) -> LensReading:
        """What `probes.lenses.logit_lens` measures, through this lens; options as there.

        Raises:
            ValueError: the lens belongs to a model of another width or depth.
        """
        depths, width = self.b.shape
        if (depths, width) != (len(model.visits), model.d_model):
            raise ValueError(
                f"This lens has {depths} depths of width {width}; {model.name!r} has {len(model.visits)} of {model.d_model}."
            )
        return logit_lens(model, tokens, translate=self, **options)

    @classmethod
    def load(cls, folder: str | Path) -> "TunedLens":
        """The finished lens of a folder that `train_tuned_lens` wrote. Raises CheckpointError if there is none."""
        tensors, _ = read_tensors(Path(folder) / LENS)
        lens = cls(*tensors["b"].shape).to(tensors["b"].dtype)
        lens.load_state_dict(tensors)
        return lens


@dataclass(frozen=True)
class TunedLensResult:
    """Result of `train_tuned_lens`. KLs are means over held-out tokens in nats, by depth; the last depth is the model and not in them."""

    lens: TunedLens
    depths: tuple[str, ...]
    held_out: tuple[float, ...]
    logit_lens: tuple[float, ...]
    steps: int
    completed: bool

    def to_json(self) -> dict[str, Any]:
        """Everything but the lens."""
        return {name: value for name, value in vars(self).items() if name != "lens"}

    def __repr__(self) -> str:
        rows = zip(self.depths, self.logit_lens, self.held_out, strict=True)
        return "\n".join(
            [f"TunedLens after {self.steps} steps; held-out KL in nats, logit lens → tuned lens"]
            + [f"  {depth}: {before:.3f} → {after:.3f}" for depth, before, after in rows]
        )


def train_tuned_lens(
    model: Any,
    data: Batches,
    folder: str | Path,
    *,
    steps: int = 250,
    learning_rate: float = 1e-3,
    clip: float = 1.0,
    checkpoint_every: int = 50,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> TunedLensResult:
    """Train a lens, or go on where an earlier call with the same arguments stopped.

    Args:
        data: batches as for training a model; held-out KLs come from its validation batches. folder: checkpoint and, when finished,
            `lens.safetensors` and `lens.json`. clip: largest norm of the gradient. checkpoint_every: steps between checkpoints.
        progress: called as (fraction, message) after every step. cancel: when set, a checkpoint is written after the current step and
            the result says `completed=False`.

    Raises:
        ValueError: less than one step. CheckpointError: the folder holds the checkpoint of another model, other data or settings.
    """
    if steps < 1 or checkpoint_every < 1:
        raise ValueError(f"steps is {steps} and checkpoint_every {checkpoint_every}; expected at least 1.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"steps": steps, "learning_rate": learning_rate, "clip": clip}
    weights = {"name": model.name, "sha256": model.weights_sha256()}
    identity = json.loads(json.dumps({"config": settings, "data": data.describe(), "model": weights}))
    parameter = next(model.parameters())
    lens = TunedLens(len(model.visits), model.d_model).to(parameter.device, parameter.dtype)
    optimizer = torch.optim.Adam(lens.parameters(), lr=learning_rate)
    done = 0
    if (folder / CHECKPOINT).exists():
        done = load_checkpoint(folder / CHECKPOINT, lens, optimizer, identity, set())["step"]
    training, stopped = model.training, False
    model.eval()  # dropout would make the target random
    try:
        while done < steps and not stopped:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - done / steps)
            tokens = data.next_batch(done)[0][:, :-1].to(parameter.device)
            loss = divergences_by_depth(model, lens, tokens).sum()
            for p, gradient in zip(lens.parameters(), torch.autograd.grad(loss, list(lens.parameters())), strict=True):
                p.grad = gradient
            nn.utils.clip_grad_norm_(lens.parameters(), clip)
            optimizer.step()
            done += 1
            stopped = cancel is not None and cancel.is_set() and done < steps
            if done % checkpoint_every == 0 or done == steps or stopped:
                save_checkpoint(folder / CHECKPOINT, lens, optimizer, {**identity, "step": done})
            if progress is not None:
                progress(
                    done / steps,
                    f"tuned lens, step {done} of {steps}, mean KL {float(loss.detach()) / len(lens.b):.3f}",
                )
        with torch.no_grad():
            plain = TunedLens(*lens.b.shape).to(lens.b)
            tuned_kl, plain_kl = (_held_out(model, one, data, parameter.device) for one in (lens, plain))
            layers = list(residual_streams(model, data.next_batch(0)[0][:1, :-1].to(parameter.device))[1])
    finally:
        model.train(training)
    result = TunedLensResult(lens, depth_names(layers)[:-1], tuned_kl, plain_kl, done, done == steps)
    if result.completed:
        write_tensors(folder / LENS, lens.state_dict(), identity)
        write_json(folder / RECORD, {**result.to_json(), **identity})
    return result


def divergences_by_depth(model: Any, lens: TunedLens, tokens: Tensor) -> Tensor:
    """Mean KL(final ‖ lens) over tokens [batch, pos] at each depth, in nats, [depth]. The model is not differentiated."""
    with torch.no_grad():
        final, streams = residual_streams(model, tokens)
    logits = (model.unembed_residual(lens(depth, h)) for depth, h in enumerate(streams.values()))
    return torch.stack([divergence(final, each).mean() for each in logits])


def _held_out(model: Any, lens: TunedLens, data: Batches, device: torch.device) -> tuple[float, ...]:
    batches = [batch[0][:, :-1].to(device) for batch in data.validation_batches()]
    totals = sum(divergences_by_depth(model, lens, tokens) * tokens.numel() for tokens in batches)
    assert isinstance(totals, Tensor)
    return tuple((totals / sum(tokens.numel() for tokens in batches)).tolist())
