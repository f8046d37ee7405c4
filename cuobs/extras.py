"""What to say where an optional package is missing."""

__all__ = ["hint"]


def hint(extra):
    """How to install an extra of cuobs, as the end of a sentence."""
    return f"pip install '.[{extra}]' in a checkout of cuobs"
