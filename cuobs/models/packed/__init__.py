"""Packed models: written, opened by transformers, timed."""
