"""What the Dragon Hatchling's paper says of its neurons, synapses and state, measured on small models that train in minutes."""
