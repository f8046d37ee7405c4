"""Make packed checkpoints known to transformers, when it is imported and not before.

transformers keeps its quantizers in ``transformers.quantizers.auto``; ours is added as soon as that
module is there.
"""

import importlib.abc
import importlib.util
import sys

REGISTRY = "transformers.quantizers.auto"
OURS = "cuobs.models.packed.quantizer"


def register():
    """Register the quantizer now, or once transformers has its own."""
    if REGISTRY in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the registry being imported, once."""

    def find_spec(self, name, path=None, target=None):
        """The module's own spec, with a loader that registers ours after it."""
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        """As the module's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module):
        """Run the module, then ours."""
        self._loader.exec_module(module)
        importlib.import_module(OURS)
