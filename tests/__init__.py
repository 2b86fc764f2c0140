"""The tests mirror the tree; `tests/benchmarks` holds the benchmark suite."""
