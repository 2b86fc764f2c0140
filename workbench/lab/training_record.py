"""The files of a training run: its checkpoint, its loss curve, and what is said about how it was made."""

import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.lab.checkpoints import CheckpointError, read_tensors, write_tensors
from workbench.lab.run_writer import code_version


@dataclass(frozen=True)
class CurvePoint:
    """One optimizer step. Losses in nats per token; `seconds` is process CPU time since the run began."""

    step: int  # steps done, from 1
    train_loss: float  # of this step's batch, before its update
    validation_loss: float | None  # after this step's update, where it was measured
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens: int  # tokens that the model has read so far
    seconds: float


def model_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every tensor of the state dict, which tells one model's checkpoint from another's."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Weights, optimizer state and record as one file; a kill at any moment leaves the file before it, whole."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer/{names[id(parameter)]}/{entry}": value for entry, value in state.items()}
    write_tensors(path, tensors, record)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], free: set[str]
) -> dict[str, Any]:
    """Put model and optimizer back where the checkpoint was taken; returns its record.

    `identity` is what the run was begun with, by part; raises CheckpointError where it differs, except for the config
    settings in `free`.
    """
    tensors, record = read_tensors(path)
    for part, expected in identity.items():
        found = record.get(part)
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} is no checkpoint of a training run: it has no record of its {part}")
        differing = [
            f"{key} was {found.get(key)!r}, now {expected.get(key)!r}"
            for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key) and not (part == "config" and key in free)
        ]
        if differing:
            raise CheckpointError(
                f"the run in {path.parent} was begun with another {part}: {'; '.join(differing[:5])}. "
                "Go on with what it was begun with, choose another folder, or pass resume=False to start over."
            )
    model.load_state_dict(
        {name.removeprefix("model/"): value for name, value in tensors.items() if name[:6] == "model/"}
    )
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            owner, _, entry = name.removeprefix("optimizer/").rpartition("/")
            # AdamW keeps its step counter on the CPU wherever the parameter is
            place = "cpu" if entry == "step" else parameters[owner].device
            optimizer.state[parameters[owner]][entry] = value.to(place)
    return record


def curve_until(path: Path, done: int) -> list[CurvePoint]:
    """The curve up to the checkpoint. Later lines, and one torn by a kill, belong to steps that will be done again."""
    points = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines()[:done]:
            points.append(CurvePoint(**json.loads(line)))
    if [point.step for point in points] != list(range(1, done + 1)):
        raise CheckpointError(f"{path} does not hold the {done} steps of the checkpoint beside it")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(asdict(point)) + "\n" for point in points), "utf-8")
    os.replace(temporary, path)
    return points


def package_versions() -> dict[str, str]:
    """Versions of this code, Python and the packages that decide the numbers."""
    found = {"python": platform.python_version(), "code": code_version()}
    for package in ("torch", "numpy", "safetensors", "triton"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def command_line() -> str:
    """This process's command line; of absolute paths only the last part, since records travel to other machines."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv]
    return shlex.join(["python", *words] if words[0].endswith(".py") else words)
