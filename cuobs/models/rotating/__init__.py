"""Rotations that fold away: found by structure, learned, applied."""
