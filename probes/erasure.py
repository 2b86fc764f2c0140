"""Concept erasure: the smallest change of activations after which no linear classifier can tell a concept (LEACE, Belrose et al. 2023).

    eraser = fit_eraser(activations, labels)
    eraser(activations)                          the same rows without the concept
    model.hooks([eraser.at("blocks.2.hook_resid_post")])
    eraser.save("vowels.safetensors")            and Eraser.load("vowels.safetensors")

    r(x) = x − W⁺ P W (x − μ)        W = Σ_xx^{-1/2} whitens, P projects on the columns of W Σ_xz, z the (one-hot) concept, μ the mean

Afterwards the covariance of r(x) and z is zero, which means: the best linear classifier or regression of z from r(x), under any convex
loss, is a constant. Among all affine maps with that property r changes x least in mean square. Projecting the difference of class means
away orthogonally (`Project`) guards as well for two classes, and changes x more.

What is guaranteed is guaranteed on the rows it was fitted on, and against linear readers. Non-linear ones may still read the concept,
and other rows have other covariances: fit on many more rows than the activation is wide, and check on others with `probes.linear`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.instrument.errors import HookError
from workbench.instrument.pieces import by_position
from workbench.lab.checkpoints import CheckpointError, read_tensors, write_tensors

KIND, PARTS = "LEACE eraser", ("read", "write", "mean")
Hook = tuple[str, Callable[[Tensor, Any], Tensor]]


@dataclass(frozen=True)
class Eraser:
    """A fitted r(x).

    Args:
        read, write: [n, width] float64; r(x) = x − (x − mean) readᵀ write. n: dimensions removed, at most classes − 1.
        mean: [width]. n_rows: fitted on so many.
    """

    read: Tensor
    write: Tensor
    mean: Tensor
    n_rows: int

    @property
    def rank(self) -> int:
        """Dimensions removed."""
        return len(self.read)

    def __call__(self, x: Any) -> Tensor:
        """Rows without the concept, [..., width], in float64, where x is."""
        x = (x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))).double()
        read, write, mean = (part.to(x.device) for part in (self.read, self.write, self.mean))
        return x - (x - mean) @ read.T @ write

    def at(self, point: str, *, head: int | None = None, positions: Sequence[int] | None = None) -> Hook:
        """A hook that erases along the last axis of a hook point, at one head or all, at some positions or all.

        Running it raises `HookError` where the last axis is not what was fitted on, or the head or positions do not exist.
        """

        @by_position
        def erase(x: Tensor, hook: Any) -> Tensor:
            if x.shape[-1] != len(self.mean):
                raise HookError(
                    f"This eraser was fitted on width {len(self.mean)}; the last axis of {hook.name!r} has {x.shape[-1]}."
                )
            index: list[Any] = [slice(None)] * x.dim()
            for axis, wanted in (("pos", positions), ("head", head)):
                if wanted is None:
                    continue
                if axis not in hook.axes:
                    raise HookError(f"{hook.name!r} has no axis {axis!r}: its axes are {' '.join(hook.axes)}.")
                chosen = [wanted] if isinstance(wanted, int) else list(wanted)
                size = x.shape[hook.axes.index(axis)]
                if not chosen or not all(-size <= number < size for number in chosen):
                    raise HookError(f"{axis} {chosen} of {hook.name!r}: expected some of 0..{size - 1}.")
                index[hook.axes.index(axis)] = slice(chosen[0], chosen[0] + 1 or None) if len(chosen) == 1 else chosen
            out = x.clone()
            out[tuple(index)] = self(x[tuple(index)]).to(x)
            return out

        return point, erase

    def save(self, path: str | Path) -> Path:
        """Write as one safetensors file with a JSON record, under a temporary name first; folders are made. Returns the path.

        Raises:
            ValueError: a name that does not end in .safetensors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"An eraser is stored as a safetensors file; expected a name such as {path.stem}.safetensors, got {path.name!r}."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {name: getattr(self, name) for name in PARTS}, {"kind": KIND, "n_rows": self.n_rows})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Eraser":
        """The eraser that `save` wrote, bit for bit, on the CPU.

        Raises:
            CheckpointError: no such file, one that is damaged or pickled, or one that holds something else.
        """
        tensors, record = read_tensors(path)
        if record.get("kind") != KIND or set(tensors) != set(PARTS):
            holds = ", ".join(sorted(tensors)) or "nothing"
            raise CheckpointError(f"{path} holds {holds}, and no eraser. Expected a file that Eraser.save wrote.")
        read, write, mean = (tensors[name] for name in PARTS)
        if read.shape != write.shape or read.shape[1:] != mean.shape:
            raise CheckpointError(
                f"{path}: read {list(read.shape)}, write {list(write.shape)} and mean {list(mean.shape)}, which do not fit. "
                "Expected [n, width], the same, and [width]."
            )
        return cls(read, write, mean, int(record["n_rows"]))

    def __repr__(self) -> str:
        return f"Eraser({self.rank} of {self.read.shape[1]} dimensions, fitted on {self.n_rows} rows)"


def fit_eraser(activations: Any, concept: Any, tolerance: float = 1e-8) -> Eraser:
    """LEACE in closed form, in float64.

    Args:
        activations: [row, width]. concept: labels [row], or numbers [row, dimension] (several at once, or continuous ones).
        tolerance: directions whose variance is below this share of the largest count as empty, and are left alone; so do
            dimensions of W Σ_xz.

    Raises:
        ValueError: other numbers of rows, one class, values that are not finite.
    """
    x = np.asarray(activations.detach().cpu() if isinstance(activations, Tensor) else activations, dtype=np.float64)
    z = _one_hot(concept)
    if x.ndim != 2 or len(x) != len(z):
        raise ValueError(
            f"activations have shape {x.shape} and the concept {len(z)} rows. Expected [row, width] with a label each."
        )
    if not np.isfinite(x).all() or not np.isfinite(z).all():
        raise ValueError("activations or concept hold nan or inf. Expected finite numbers.")
    mean = x.mean(0)
    x, z = x - mean, z - z.mean(0)
    if not np.abs(z).max() > 0:
        raise ValueError(
            "The concept is the same in every row, so there is nothing to erase. Expected at least two classes."
        )
    # through the singular values of x rather than its covariance, whose squares would halve the digits
    _, s, axes = np.linalg.svd(x, full_matrices=False)
    kept = s**2 > tolerance * s[0] ** 2 if s[0] > 0 else np.zeros(len(s), dtype=bool)
    spread, axes = s[kept] / np.sqrt(len(x)), axes[kept]
    whitened = (axes @ (x.T @ z) / len(x)) / spread[:, None]  # W Σ_xz in the basis of the axes
    left, strength, _ = np.linalg.svd(whitened, full_matrices=False)
    z_size = np.sqrt(np.square(z).mean(0).max())
    basis = left[:, strength > np.sqrt(tolerance) * z_size * 1e-2]
    read, write = (basis / spread[:, None]).T @ axes, (basis * spread[:, None]).T @ axes
    return Eraser(torch.from_numpy(read), torch.from_numpy(write), torch.from_numpy(mean), len(x))


def _one_hot(concept: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Labels [row] as indicators [row, class]; numbers [row, dimension] as they are."""
    values = np.asarray(concept.detach().cpu() if isinstance(concept, Tensor) else concept)
    if values.ndim == 2:
        return values.astype(np.float64)
    if values.ndim != 1:
        raise ValueError(f"The concept has shape {values.shape}; expected labels [row] or numbers [row, dimension].")
    classes, number = np.unique(values, return_inverse=True)
    return np.eye(len(classes))[number]
