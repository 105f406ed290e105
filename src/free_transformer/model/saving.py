"""Loads models, including pretrained Llamas without a plan, and saves them with their code next to the weights."""

import os

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .configuration import FreeTransformerConfig
from .hub_code import name_code
from .warm_start import warm_start

OWN_NAME = "FreeTransformer"


class SavingMixin(PreTrainedModel):
    config: FreeTransformerConfig

    @property
    def device(self) -> torch.device:
        """The device that the model computes on, even if `accelerate` has offloaded its weights."""
        device = super().device
        if device.type == "meta":
            for module in self.modules():
                hook = getattr(module, "_hf_hook", None)
                for each in getattr(hook, "hooks", [hook]):
                    if getattr(each, "execution_device", None) is not None:
                        return torch.device(each.execution_device)
        return device

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *args: object, encoder: nn.Module | None = None, **kwargs: object
    ) -> PreTrainedModel:
        """
        `PreTrainedModel.from_pretrained`; also loads a Llama, Mistral, Qwen 2 or Qwen 3 without a plan.

        The logits of such a model do not change: the codebook is initialized to zero, and the encoder to a copy of the
        layer that receives the plan.

        Raises:
            ValueError: for any other kind of model.
        """
        tells = kwargs.pop("output_loading_info", False)
        own = {}
        if encoder is not None:  # `transformers` fills buffers missing in the checkpoint with uninitialized memory
            own = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
            kwargs["encoder"] = encoder
        model, loading = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        for name in kwargs.keys() & vars(model.generation_config).keys() - vars(GenerationConfig()).keys():
            delattr(model.generation_config, name)  # model settings, which `transformers` also stores there
        stored = model.encoder.state_dict() if own else {}
        for name, buffer in own.items():
            if name not in stored:
                model.encoder.get_buffer(name).copy_(buffer)
        if encoder is None and "encoder.query" in loading["missing_keys"]:
            warm_start(model)
        return (model, loading) if tells else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: object, **kwargs: object) -> None:
        """As in `transformers`, but also saves the model's code next to the weights, unless a part of it is custom."""
        name = type(self).__name__.removeprefix("FSDP")  # FSDP's subclass of this class
        name_code(self.config, wanted=name == OWN_NAME and self.config.encoder_class is None)
        super().save_pretrained(save_directory, *args, **kwargs)
