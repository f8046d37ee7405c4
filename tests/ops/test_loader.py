"""Every kernel compiles, on the device too."""

import pytest

from cuobs.ops.cuda import loader


@pytest.mark.gpu
def test_every_variant_compiles_and_loads(cp):
    """What CI compiles without a device is what the device gets."""
    from cuobs.ops.cuda import packed_hopper

    seen = set()
    for source, defines in loader.variants():
        seen.add(source)
        options = loader.options(defines)
        if source != packed_hopper.SOURCE:
            cp.RawModule(code=loader.text(source), options=options).compile()
        elif cp.cuda.Device().compute_capability == "90":
            packed_hopper.module(options, cp.cuda.Device().id)
    assert seen == set(loader.sources())
