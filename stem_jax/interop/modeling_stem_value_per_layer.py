"""Value embeddings and per-layer embeddings in one model, for `modeling_stem`."""

from .configuration_stem import StemValuePerLayerConfig
from .modeling_stem import StemForCausalLM
from .modeling_stem_per_layer import PerLayerDecoderLayer, StemPerLayerModel
from .modeling_stem_value import ValueDecoderLayer


class ValuePerLayerDecoderLayer(PerLayerDecoderLayer, ValueDecoderLayer):
    """Rows in attention, and behind the FFN."""


class StemValuePerLayerModel(StemPerLayerModel):
    """The decoder without its head."""

    config_class = StemValuePerLayerConfig
    layer_class = ValuePerLayerDecoderLayer
    memories = ("value", "per_layer")


class StemValuePerLayerForCausalLM(StemForCausalLM):
    """The decoder with its head."""

    config_class = StemValuePerLayerConfig
    model_class = StemValuePerLayerModel
