"""Pure figures: arrays in, `plotly.graph_objects.Figure` out. No dash, no run store, no torch."""
