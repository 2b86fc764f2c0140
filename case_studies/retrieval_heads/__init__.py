"""Retrieval heads (Wu et al. 2024): planted by hand, in the authors' released scores, in models trained here, in a checkpoint of yours."""
