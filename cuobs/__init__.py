"""Second-order pruning of linear layers to patterns that hardware can use."""

__version__ = "0.1.0"
