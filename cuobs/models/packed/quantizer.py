"""How transformers opens packed checkpoints: ``quant_method`` "cuobs"."""

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cuobs.models.checkpoints.source import METHOD
from cuobs.models.packed.packing import check_config, put_packed
from cuobs.ops.packed import VERSION


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What ``config.json`` says of packed linears.

    Parameters
    ----------
    version : int
        Of the order of the bytes.
    pattern : str
        By what they are packed, to read.
    modules : dict of str to str
        The pattern of each, by its name in the model.
    """

    def __init__(self, version=VERSION, pattern="", modules=None, **kwargs):
        self.quant_method = METHOD
        self.version = version
        self.pattern = pattern
        self.modules = modules or {}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts `cuobs.torch.PackedLinear` where weights are packed, before they are read."""

    requires_calibration = True  # weights are packed by `cuobs pack-model`, not while they load

    def validate_environment(self, *args, **kwargs):
        """Refuse a checkpoint of another version."""
        check_config("config.json", self.quantization_config)

    def _process_model_before_weight_loading(self, model, **kwargs):
        put_packed(model, self.quantization_config.modules)
        return model

    def is_serializable(self, *args, **kwargs):
        """Whether ``save_pretrained`` may write the model."""
        return True

    @property
    def is_trainable(self):
        """Whether it learns: it has no gradients."""
        return False

    @property
    def is_compileable(self):
        """Whether `torch.compile` takes it."""
        return True
