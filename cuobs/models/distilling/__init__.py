"""Distillation with the masks fixed."""
