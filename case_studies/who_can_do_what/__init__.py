"""Which sequence mixer learns which task, at equal size and equal training."""
