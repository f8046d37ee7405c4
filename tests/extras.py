"""Which extras of cuobs are installed."""

from importlib.util import find_spec

MODEL = all(find_spec(name) for name in ("torch", "transformers", "safetensors"))
