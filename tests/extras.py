"""What of cuobs is installed: the command line, and which extras."""

from importlib.util import find_spec

MODEL = all(find_spec(name) for name in ("torch", "transformers", "safetensors"))
COMMAND_LINE = find_spec("cuobs_cli") is not None
