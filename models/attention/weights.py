"""The weights of an attention site under TransformerLens's names and shapes."""

from typing import Any

from torch import Tensor


class HeadWeights:
    """For a class with linear maps `query`, `key`, `value`, `output`, and `n_heads`, `n_maps`, `n_kv`, `sizes`."""

    query: Any
    key: Any
    value: Any
    output: Any
    n_heads: int
    n_maps: int
    n_kv: int
    sizes: Any

    @property
    def W_Q(self) -> Tensor:
        """[head, d_model, d_head]."""
        return self.query.weight.unflatten(0, (self.n_maps, -1)).transpose(1, 2)

    @property
    def W_K(self) -> Tensor:
        """[kv_head, d_model, d_head]."""
        return self.key.weight.unflatten(0, (self.sizes.n_key_maps, -1)).transpose(1, 2)

    @property
    def W_V(self) -> Tensor:
        """[kv_head, d_model, d_value]."""
        return self.value.weight.unflatten(0, (self.n_kv, -1)).transpose(1, 2)

    @property
    def W_O(self) -> Tensor:
        """[head, d_value, d_model]."""
        return self.output.weight.T.unflatten(0, (self.n_heads, -1))

    @property
    def b_Q(self) -> Tensor:
        """[head, d_head]."""
        return _bias(self.query).unflatten(0, (self.n_maps, -1))

    @property
    def b_K(self) -> Tensor:
        """[kv_head, d_head]."""
        return _bias(self.key).unflatten(0, (self.sizes.n_key_maps, -1))

    @property
    def b_V(self) -> Tensor:
        """[kv_head, d_value]."""
        return _bias(self.value).unflatten(0, (self.n_kv, -1))

    @property
    def b_O(self) -> Tensor:
        """[d_model]."""
        return _bias(self.output)


def _bias(linear: Any) -> Tensor:
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.weight.shape[0])
