"""Tables with a row for each token id, which may stay in host memory.

`table_device="cpu"` keeps them there when the rest of the model moves to an accelerator; only the
rows of the tokens at hand then travel:

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True, table_device="cpu")
    model.to("cuda")
"""

from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class StemTable(nn.Embedding):
    """Rows [V, F] by token id, which may stay on a device of their own."""

    def __init__(self, vocab_size, width, home=None):
        super().__init__(vocab_size, width)
        self.home = None if home is None else torch.device(home)

    def forward(self, input_ids):
        """On the device of the ids."""
        return super().forward(input_ids.to(self.weight.device)).to(input_ids.device)

    def _apply(self, fn, recurse=True):
        if self.home is None:
            return super()._apply(fn, recurse)

        def stay(tensor):
            if tensor.is_meta:
                return fn(tensor)
            # What `fn` would make of a tensor without elements tells the dtype that it asks for.
            return tensor.to(self.home, fn(tensor.new_empty(0)).dtype)

        return super()._apply(stay, recurse)


class WithTables(PreTrainedModel):
    """What a model with tables does otherwise; named first among the bases."""

    @classmethod
    def from_pretrained(cls, path, *args, config=None, device_map=None, **kwargs):
        """As in the base class; with `table_device`, `device_map` may name one device only."""
        load = partial(super().from_pretrained, path, *args, config=config, **kwargs)
        if device_map is None:
            return load()
        if not isinstance(config, PretrainedConfig):
            config = cls.config_class.from_pretrained(config or path, **kwargs)
        if config.table_device is None:
            return load(device_map=device_map)
        if isinstance(device_map, dict) or device_map in ("auto", "balanced", "sequential"):
            raise ValueError(
                f"device_map={device_map!r} cannot be had with table_device="
                f'{config.table_device!r}; name one device, such as device_map="cuda", or leave '
                "out table_device"
            )
        return load().to(device_map)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, StemTable):
            nn.init.normal_(module.weight, std=(2 / sum(module.weight.shape)) ** 0.5)

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("the tables have a row for each token id: the vocabulary cannot change")
