"""The Dragon Hatchling (BDH)."""
