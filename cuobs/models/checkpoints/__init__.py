"""Checkpoints: what SRC holds, what DST will, and what is kept of an unfinished run."""
