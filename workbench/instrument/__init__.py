"""Reading and editing a forward pass: hook points, the hooked model, caches, interventions, patterns and states."""
