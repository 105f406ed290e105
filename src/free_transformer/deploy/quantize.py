"""
Integers in the place of a model's matrices, in PyTorch.

The head, the embedding and the table of plans stay as they are: what is rounded are the linear maps of the layers and
of the encoder.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.config import FreeTransformerConfig
from free_transformer.files import new_folder, write_json
from free_transformer.model import FreeTransformer

SCHEMES = ("int8-weight", "int8-dynamic")
DYNAMIC_FILE, WEIGHTS_FILE = "int8_dynamic.json", "model.safetensors"


def quantize(
    model: PreTrainedModel,
    scheme: str | None,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """
    Writes a quantized model and returns it, as `load_quantized` would.

    Args:
        scheme: `"int8-weight"`, torchao's: weights in 8 bits, a scale for each row, products in the model's own type.
            A quarter of the size on any device; faster only where memory is slower than the unpacking, and on a CPU
            it is not. `"int8-dynamic"`, PyTorch's own: products of integers, the activations' scale being found while
            it runs; on a CPU alone, where it is faster.

    Raises:
        ValueError: for an unknown scheme, a model without a plan, or a device that cannot run the scheme.
        ImportError: without torchao, which int8-weight needs.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize={scheme!r}: one of {SCHEMES}")
    if not isinstance(model, FreeTransformer):
        raise ValueError(f"{type(model).__name__} has no plan: quantize takes a Free Transformer")
    folder = Path(folder)
    write = _write_weight_only if scheme == "int8-weight" else _write_dynamic
    with new_folder(Path(folder)) as temporary:
        write(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return load_quantized(folder)


def is_quantized(folder: Path) -> bool:
    """Whether `load_quantized` alone can read the folder."""
    return (folder / DYNAMIC_FILE).is_file()


def load_quantized(folder: str | Path) -> PreTrainedModel:
    """A model that `quantize` has written, in eval mode; of int8-weight `from_pretrained` gives the same."""
    folder = Path(folder)
    if not is_quantized(folder):
        return FreeTransformer.from_pretrained(folder).eval()
    _check_device(torch.device("cpu"))
    model = _with_dynamic_layers(FreeTransformer(FreeTransformerConfig.from_pretrained(folder)))
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, layer in _dynamic_layers(model):
        values, scales = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale")
        packed = torch._make_per_channel_quantized_tensor(values, scales, torch.zeros_like(scales).long(), 0)
        layer.set_weight_bias(packed, tensors.pop(f"{name}.bias", None))
    places = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    if set(tensors) - set(places):
        raise ValueError(f"{folder}: weights of another model ({', '.join(sorted(set(tensors) - set(places))[:3])})")
    with torch.no_grad():
        for name, values in tensors.items():
            places[name].copy_(values)
    model.tie_weights()
    return model.eval()


def _write_weight_only(model: FreeTransformer, folder: Path) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError("int8-weight needs torchao: pip install 'free-transformer-lm[quantize]'") from error
    from transformers import TorchAoConfig

    model.save_pretrained(folder)
    quantized = FreeTransformer.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    quantized.save_pretrained(folder)


def _write_dynamic(model: FreeTransformer, folder: Path) -> None:
    _check_device(model.device)
    quantized = _with_dynamic_layers(copy.deepcopy(model).float().eval())
    layers = dict(_dynamic_layers(quantized))
    tensors = {
        name: value
        for name, value in model.float().state_dict().items()
        if name.rpartition(".")[0] not in layers and name not in model.all_tied_weights_keys
    }
    for name, layer in layers.items():
        weight, bias = layer._weight_bias()
        tensors |= {f"{name}.weight": weight.int_repr(), f"{name}.scale": weight.q_per_channel_scales()}
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS_FILE)
    write_json(folder / DYNAMIC_FILE, {"engine": torch.backends.quantized.engine})


def _with_dynamic_layers(model: FreeTransformer) -> FreeTransformer:
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch points to torchao, whose dynamic int8 is slower on a CPU
        return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def _dynamic_layers(model: nn.Module) -> list[tuple[str, Any]]:
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    return [(name, module) for name, module in model.named_modules() if isinstance(module, dynamic)]


def _check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"int8-dynamic runs on a CPU alone, this model is on {device}: use int8-weight")
    if torch.backends.quantized.engine in ("none", ""):
        raise ValueError(
            f"int8-dynamic: this PyTorch has no integer kernels for {torch.backends.cpu.get_cpu_capability()}"
        )
