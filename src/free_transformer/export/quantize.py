"""
Integers in the place of a model's matrices, in PyTorch.

The head, the embedding and the table of plans stay as they are: what is rounded are the linear maps of the layers and
of the encoder.
"""

import copy
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.export.files import SCHEMES, check_export, dynamic_layers
from free_transformer.files import first_line, own_folder, write_json
from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.model.hub_code import name_code
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runs.load_model import check_finite, check_names, load_pretrained

DYNAMIC_FILE, WEIGHTS_FILE = "int8_dynamic.json", "model.safetensors"


def quantize(
    model: PreTrainedModel,
    scheme: str | None,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> PreTrainedModel:
    """
    Writes a quantized model and returns it, as `load_quantized` would.

    Args:
        scheme: `"int8-weight"`, torchao's: weights in 8 bits, a scale for each row, products in the model's own type.
            A quarter of the size on any device; faster only where memory is slower than the unpacking, and on a CPU
            it is not. `"int8-dynamic"`, PyTorch's own: products of integers, the activations' scale being found while
            it runs; on a CPU alone, where it is faster.
        overwrite: replaces a folder whatever it holds; otherwise only a new or empty one, or an earlier export.

    Raises:
        ValueError: for an unknown scheme, a model without a plan or with 8-bit weights, a device that cannot run the
            scheme, and a folder that holds other files.
        ImportError: without torchao, which int8-weight needs.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize={scheme!r}: one of {SCHEMES}")
    check_export(model, None)
    with own_folder(Path(folder), "export", overwrite) as temporary:
        if scheme == "int8-weight":
            _write_weight_only(model, temporary)
        else:
            _write_dynamic(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return load_quantized(folder)


def is_quantized(folder: Path) -> bool:
    """Whether `load_quantized` alone can read the folder."""
    return (folder / DYNAMIC_FILE).is_file()


def load_quantized(folder: str | Path) -> PreTrainedModel:
    """
    A model that `quantize` has written, in eval mode; of int8-weight `from_pretrained` gives the same.

    Raises:
        ValueError: where the weights cannot be read, or are of another model.
    """
    folder = Path(folder)
    if not is_quantized(folder):
        return load_pretrained(folder, FreeTransformer)
    _check_device(torch.device("cpu"))
    model = _withdynamic_layers(FreeTransformer(FreeTransformerConfig.from_pretrained(folder)))
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: the model cannot be read ({first_line(error)})") from error
    places = _plain_tensors(model)
    layers = dict(dynamic_layers(model))
    shapes = {name: place.shape for name, place in places.items()}
    for name, layer in layers.items():
        weight = layer.weight()
        shapes |= {f"{name}.weight": weight.shape, f"{name}.scale": weight.shape[:1]}
    check_names(folder, "weights are missing", [name for name in shapes if name not in tensors])
    biases = {f"{name}.bias" for name in layers}
    wrong = [name for name, shape in shapes.items() if tensors[name].shape != shape]
    wrong += sorted(set(tensors) - set(shapes) - biases)
    check_names(folder, "the weights are of another model", wrong)
    check_finite(folder, tensors.items())
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])
    for name, layer in layers.items():
        values, scales = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        packed = torch._make_per_channel_quantized_tensor(values, scales, torch.zeros_like(scales).long(), 0)
        layer.set_weight_bias(packed, tensors.get(f"{name}.bias"))
    return model.eval()


def _write_weight_only(model: FreeTransformer, folder: Path) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError("int8-weight needs torchao: pip install 'free-transformer-lm[quantize]'") from error
    from transformers import TorchAoConfig

    model.save_pretrained(folder)
    quantized = FreeTransformer.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    quantized.save_pretrained(folder)


def _write_dynamic(model: FreeTransformer, folder: Path) -> None:
    _check_device(model.device)
    quantized = _withdynamic_layers(copy.deepcopy(model).float().eval())
    tensors = {name: value.detach().contiguous() for name, value in _plain_tensors(quantized).items()}
    for name, layer in dynamic_layers(quantized):
        weight, bias = layer._weight_bias()
        tensors |= {f"{name}.weight": weight.int_repr(), f"{name}.scale": weight.q_per_channel_scales()}
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach()
    config = copy.deepcopy(model.config)
    name_code(config, wanted=False)  # it could not read what is written here
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS_FILE)
    write_json(folder / DYNAMIC_FILE, {"engine": torch.backends.quantized.engine})


def _plain_tensors(model: FreeTransformer) -> dict[str, Tensor]:
    """What a model with dynamic layers keeps besides them; of tied weights the one that others are tied to."""
    layers = dict(dynamic_layers(model))
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
        and not any(name.startswith(f"{layer}.") for layer in layers)
        and name not in model.all_tied_weights_keys
    }


def _withdynamic_layers(model: FreeTransformer) -> FreeTransformer:
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch points to torchao, whose dynamic int8 is slower on a CPU
        return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def _check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"int8-dynamic runs on a CPU alone, this model is on {device}: use int8-weight")
    if torch.backends.quantized.engine in ("none", ""):
        raise ValueError(
            f"int8-dynamic: this PyTorch has no integer kernels for {torch.backends.cpu.get_cpu_capability()}"
        )
