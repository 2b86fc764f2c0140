"""Ways through the blocks of a model: repeated, halting, averaged over depth, on two levels. Each file is found by being there."""
