"""The experiments by subject, one file each; a file registers its own and is found by being there."""
