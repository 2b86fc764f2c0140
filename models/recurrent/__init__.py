"""Sequence mixers whose memory is a state of fixed size."""
