"""Panels: what each frame of the dashboard draws, from which arrays, and the Python that makes the same arrays."""
