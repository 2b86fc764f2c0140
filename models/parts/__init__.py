"""Parts shared by architectures: norms, positions, channel mixers."""
