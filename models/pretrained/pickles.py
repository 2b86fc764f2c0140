"""Weights that were published as pickles only, rewritten as safetensors by the user's explicit choice.

    convert_pickles("old-model", "new-model")        or `workbench models old-model --convert new-model`

A pickle can run any code when it is read. torch's restricted unpickler (`weights_only=True`) refuses everything but tensors.
"""

import fnmatch
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.pretrained.hub import FILES
from models.pretrained.stored import SINGLE, Checkpoint
from workbench.lab.checkpoints import CheckpointError


@torch.no_grad()
def convert_pickles(folder: str | Path, target: str | Path) -> Path:
    """A new folder with the same tensors as safetensors, and the configuration, model card and tokenizer as they are.

    Raises:
        CheckpointError: a folder that has safetensors already or no weights at all, a pickle that holds more than tensors, a target that
            exists.
    """
    source, made = Path(folder), Path(target)
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder. Expected one with a config.json and pickled weights.")
    if made.exists():
        raise CheckpointError(f"{made} exists already. Expected the name of a new folder.")
    checkpoint = Checkpoint(source, allow_pickle_conversion=True)
    if not checkpoint.unpickled:
        raise CheckpointError(f"{source} has its weights as safetensors already, so there is nothing to convert.")
    partial = made.with_name(f".partial-{made.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in source.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in FILES):
                shutil.copy(file, partial / file.name)
        # names that share memory are stored apart, as the format wants it
        tensors = {name: tensor.clone().contiguous() for name, tensor in checkpoint.unpickled.items()}
        save_file(tensors, partial / SINGLE, {"format": "pt"})
        partial.rename(made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made
