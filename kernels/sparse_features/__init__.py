"""Sparse codes of a dictionary: the few strongest features of each row, and the decoding that touches only those.

    values, features = top_features(x, weight, bias, k)          the k largest of ReLU(x Wᵀ + b) in every row
    y = decode(values, features, dictionary)                     y = Σ_j values_j · dictionary[features_j]

A dense step multiplies by the whole dictionary five times (twice forwards, three times backwards); here one product remains,
the encoder's, and everything else costs rows · k. Both functions are differentiable in all tensors and agree with the dense
equations of `reference`. `batch_top_features` spends k · rows features where they are largest (Bussmann et al. 2024).
"""

from .sparse import SparseCodes, batch_top_features, decode, top_features

__all__ = ["SparseCodes", "batch_top_features", "decode", "top_features"]
