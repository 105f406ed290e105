"""
8-bit weights in PyTorch, quantized by torchao and stored in the format that `transformers` reads.

The linear layers of the decoder and the encoder are quantized. The head, the embedding and the codebook keep their
type.
"""

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig

from free_transformer.errors import InputError, MissingDependency, RunError
from free_transformer.export.files import SCHEMES, check_export
from free_transformer.files import own_folder
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runs.load_model import check_finite, check_names, load_pretrained

if TYPE_CHECKING:
    from torchao.quantization import Int8Tensor


def quantize(
    model: PreTrainedModel,
    scheme: str | None,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> PreTrainedModel:
    """
    Saves a quantized copy of a model, and returns it as `load_quantized` loads it.

    Args:
        model: a Free Transformer without 8-bit weights. It stays unchanged.
        scheme: `"int8-weight"` stores weights in 8 bits with one scale per row, and multiplies in the model's own type.
            It reduces the size on any device; on a CPU it does not increase the speed. `"int8-dynamic"` also
            multiplies in integers, with activations quantized at run time. It is for CPUs, computes in float32 outside
            of the products, and is faster there.
        folder: the new folder, also readable by `AutoModelForCausalLM.from_pretrained` where torchao is installed.
        tokenizer: saved in the folder.
        overwrite: replace the folder whatever it contains. Otherwise it must be new, empty or an earlier export.

    Raises:
        ValueError: for an unknown scheme, a model without a plan or with 8-bit weights, a device that cannot run the
            scheme, and a folder that contains other files.
        ImportError: without torchao.
    """
    if scheme not in SCHEMES:
        raise InputError(f"quantize={scheme!r}: one of {SCHEMES}")
    model = check_export(model, None)
    if scheme == "int8-dynamic" and model.device.type != "cpu":
        raise InputError(f"int8-dynamic runs only on a CPU, but this model is on {model.device}: use int8-weight")
    config = _torchao_config(scheme)
    with own_folder(Path(folder), "export", overwrite) as temporary:
        (copy.deepcopy(model).float() if scheme == "int8-dynamic" else model).save_pretrained(temporary)
        quantized = FreeTransformer.from_pretrained(temporary, quantization_config=config)
        for file in temporary.glob("*.safetensors*"):
            file.unlink()
        quantized.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return load_quantized(folder)


def load_quantized(folder: str | Path) -> PreTrainedModel:
    """
    Loads a saved model, such as one saved by `quantize`, in eval mode.

    Layers quantized with int8-dynamic run on PyTorch's integer kernels for CPUs, which are several times faster than
    torchao's; `from_pretrained` uses torchao's. A quantized model can generate and be evaluated. It cannot be saved
    again: copy its folder instead.

    Raises:
        SettingsError: if the folder cannot be read, or weights are missing, of another shape, or NaN or infinite.
    """
    model = load_pretrained(folder)
    if not isinstance(getattr(model.config, "quantization_config", None), TorchAoConfig):
        return model
    from torchao.quantization import Int8Tensor

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and isinstance(layer.weight, Int8Tensor):
            _check_weight(folder, f"{name}.weight", layer, layer.weight)
            if layer.weight.act_quant_kwargs is not None and _has_integer_kernels():
                model.set_submodule(name, PackedLinear(layer.weight, layer.bias))
    return model


class PackedLinear(nn.Module):
    """
    Linear layer with int8 weights in the layout of PyTorch's integer kernels for CPUs.

    Args:
        weight: (out features, in features), symmetric with one scale per row.
        bias: (out features,) in float32.
    """

    def __init__(self, weight: "Int8Tensor", bias: Tensor | None):
        super().__init__()
        scales = weight.scale.flatten()
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated; `load_quantized` keeps torchao's layers once they are removed
            integers = torch._make_per_channel_quantized_tensor(weight.qdata, scales, zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(integers, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in features) -> (..., out features), float32."""
        # with 7-bit activations the sum of two products fits the 16 bits that processors without VNNI add them in
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)

    def _save_to_state_dict(self, *_: object) -> None:
        raise RunError("packed int8 weights cannot be saved: copy the folder that they were loaded from")


def _check_weight(folder: str | Path, name: str, layer: nn.Linear, weight: "Int8Tensor") -> None:
    """Checks the tensors of a quantized weight, which `load_pretrained` does not see."""
    if weight.qdata.shape != (layer.out_features, layer.in_features) or weight.scale.numel() != layer.out_features:
        check_names(folder, "weights of another shape than the configuration's", [name])
    check_finite(folder, [(name, weight.scale)])


def _has_integer_kernels() -> bool:
    return torch.backends.quantized.engine != "none" and hasattr(torch, "_make_per_channel_quantized_tensor")


def _torchao_config(scheme: str) -> TorchAoConfig:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise MissingDependency(f"{scheme} needs torchao: pip install 'free-transformer-lm[quantize]'") from error
    kind = Int8WeightOnlyConfig if scheme == "int8-weight" else Int8DynamicActivationInt8WeightConfig
    return TorchAoConfig(kind(version=2))
