"""The published benchmark at its own size: what it ran, what we run, side by side."""
