"""The attention site."""
