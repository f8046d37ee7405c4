"""Pruning block by block: both streams of hidden states, groups, targets, rows."""
