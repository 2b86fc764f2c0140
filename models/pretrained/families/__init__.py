"""One file per family of published checkpoints: its configuration and tensor names in our terms. Found by being there."""
