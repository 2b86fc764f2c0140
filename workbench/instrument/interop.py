"""Our models in TransformerLens's hands.

Most of its utilities take a model as it is (its protocols are structural) and our cache, or `cache.to_transformer_lens(model)`.
Some run the model themselves and go on with methods of *their* cache; for these there is a view of the model whose caches are theirs.
"""

from typing import Any

from workbench.instrument.hooked_model import HookedModel


def transformer_lens_view(model: HookedModel) -> Any:
    """The same model (one set of parameters, hook points and switches), whose `run_with_cache` gives a `transformer_lens.ActivationCache`.

    Returns:
        An instance of a subclass of the model's class that shares everything with it. For TransformerLens's tools only: methods of
        the workbench that read a cache (`patterns`, `states`) stay with the model itself.
    """
    kind = type(model)

    def run_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, cache = kind.run_with_cache(self, *args, **kwargs)
        return output, cache.to_transformer_lens(self)

    view: Any = object.__new__(type(f"{kind.__name__}View", (kind,), {"run_with_cache": run_with_cache}))
    view.__dict__ = model.__dict__
    return view
