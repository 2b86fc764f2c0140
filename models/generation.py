"""`Generation`: going on from a batch of prompts, token by token, with hooks, padding and a carried state. A base of `Decoder`."""

from typing import Any

import torch
from torch import Tensor

from workbench.instrument.attaching import HookList
from workbench.instrument.states import ModelState


class Generation:
    """Adds `generate` to a model that hands on a state."""

    @torch.no_grad()
    def generate(
        self: Any,
        tokens: Any,
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int | None = None,
        mask: Tensor | None = None,
        use_state: bool = True,
        hooks: HookList = (),
        strict: bool = True,
    ) -> Tensor:
        """Continue a batch of prompts; hooks fire at every step and positions are absolute.

        Args:
            tokens: prompts, [batch, pos] or text. mask: True at real tokens (padding on either side).
            temperature: 0 takes the most likely token; otherwise sample, among the `top_k` most likely if given, with `seed`.
            use_state: carry the cache or state from step to step; False re-reads the whole sequence every time (slow, same tokens).
            hooks: as in `model.hooks`.

        Returns:
            Prompts with the new tokens appended, [batch, pos + max_new_tokens].

        Raises:
            ValueError: a negative temperature or number of tokens, top_k below 1, and as for a call.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more.")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; expected 0 (most likely token) or more.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected at least 1, or None for all tokens.")
        tokens = self.to_tokens(tokens)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        state: ModelState | None = None
        fresh, fresh_mask, whole_mask = tokens, mask, mask
        with self.hooks(hooks, strict=strict):
            for _ in range(max_new_tokens):
                if use_state:
                    logits, state = self(fresh, mask=fresh_mask, state=state, return_state=True)
                else:
                    logits = self(tokens, mask=whole_mask)
                last = self._last_logits(logits, fresh_mask if use_state else whole_mask)
                fresh = _pick(last, temperature, top_k, generator)
                tokens = torch.cat([tokens, fresh], dim=1)
                fresh_mask = None
                if whole_mask is not None:
                    whole_mask = torch.cat([whole_mask, torch.ones_like(whole_mask[:, :1])], dim=1)
        return tokens

    @staticmethod
    def _last_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
        """Logits at the last real token of each sequence, [batch, vocab]."""
        if mask is None:
            return logits[:, -1]
        steps = torch.arange(logits.shape[1], device=logits.device)
        last = (mask.to(logits.device) * steps).argmax(1)
        return logits[torch.arange(logits.shape[0], device=logits.device), last]


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        best = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(1, best.indices, best.values)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
