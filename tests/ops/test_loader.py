"""Every kernel compiles, on the device too."""

import pytest

from cuobs.ops.cuda import loader


@pytest.mark.gpu
def test_every_variant_compiles_and_loads(cp):
    """What CI compiles without a device is what the device gets."""
    seen = set()
    for source, defines in loader.variants():
        seen.add(source)
        cp.RawModule(code=loader.text(source), options=loader.options(defines)).compile()
    assert seen == set(loader.sources())
