"""Errors of the instrument. Each names the thing, says what was expected, and suggests the nearest right name."""

from collections.abc import Iterable
from difflib import get_close_matches


class HookError(Exception):
    """Base of every error about hook points."""


class UnknownHookPoint(HookError, KeyError):
    """A name, glob, role, layer or predicate that selects nothing on this model."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class HookNeverReached(HookError):
    """A hook was attached and the forward pass never came to its hook point."""


class HookReturnError(HookError, ValueError):
    """A hook returned something that cannot take the activation's place."""


class HookSignatureError(HookError, TypeError):
    """A hook cannot be called as `hook(activation, hook=hook_point)`."""


class ReadOnlyHookPoint(HookError):
    """An edit at a hook point that only reports."""


class CachedTensorChanged(HookError):
    """A cached tensor was changed in place after it had been stored."""


class RefusedByPattern(HookError, ValueError):
    """A measurement was asked of a pattern whose metadata says that it would be meaningless."""


def suggestion(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """`" Did you mean 'a' or 'b'?"`, or an empty string if nothing is near."""
    near = get_close_matches(name, list(candidates), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
