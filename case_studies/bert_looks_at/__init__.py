"""What does BERT look at? (Clark et al. 2019), asked of a published encoder."""
