"""How fast cuobs is: `pytest perf --benchmark-only`, and `python -m perf.published`."""
