import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from free_transformer import FreeTransformer
from free_transformer.data import byte_tokenizer
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.export import quantize as quantize_module
from free_transformer.export.aot import export_aot
from free_transformer.export.files import SCHEMES, TOLERANCE
from free_transformer.export.quantize import PackedLinear, load_quantized, quantize
from free_transformer.model.layout import num_plans


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(tiny_model, request) -> FreeTransformer:
    return tiny_model(torch.float32, plan_span=3, attention_bias=True, tie_embeddings=request.param)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_is_nearly_the_model_and_comes_back_the_same(model, tokens_like, tmp_path, scheme):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = quantize(model, scheme, tmp_path / "quantized", byte_tokenizer())
    loaded = load_quantized(tmp_path / "quantized")
    tokens, plan = tokens_like(3, 9), model.sample_plan(3, 3)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask, plan=plan).logits
        theirs, again = (each(tokens, attention_mask=mask, plan=plan).logits for each in (quantized, loaded))
    assert torch.equal(theirs, again)
    assert 0 < (ours - theirs)[mask.bool()].abs().max() < 0.2 * ours.std()
    assert (model.infer_plan(tokens) - loaded.infer_plan(tokens)).abs().max() < 0.1
    for name, value in model.state_dict().items():  # the model that was given stays as it is
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_generates_and_is_evaluated(model, tokens_like, tmp_path, scheme):
    loaded = quantize(model, scheme, tmp_path / "quantized")
    tokens = tokens_like(2, 5)
    generated = loaded.generate(tokens, plan=model.sample_plan(2, num_plans(3, 12)), max_new_tokens=7, do_sample=False)
    assert generated.shape == (2, 12)
    batches = [{"input_ids": tokens_like(8, 12)}]
    torch.manual_seed(1)
    ours = evaluate_likelihood(model, batches, num_samples=64)
    torch.manual_seed(1)
    theirs = evaluate_likelihood(loaded, batches, num_samples=64)
    assert theirs.nll == pytest.approx(ours.nll, abs=0.05)


def test_a_model_in_half_precision_stays_so(tiny_model, tmp_path):
    model = tiny_model(torch.bfloat16)
    quantize(model, "int8-dynamic", tmp_path / "quantized")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_folders_are_read_by_from_pretrained(model, tokens_like, tmp_path, scheme):
    quantized = quantize(model, scheme, tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert type(loaded) is FreeTransformer
    tokens, plan = tokens_like(1, 6), model.sample_plan(1, 2)
    with torch.no_grad():
        ours, theirs = quantized(tokens, plan=plan).logits, loaded(tokens, plan=plan).logits
    if scheme == "int8-weight":
        assert torch.equal(ours, theirs)
    else:  # the same weights, other kernels: they round activations differently
        assert (ours - theirs).abs().max() < 0.1 * theirs.std()


@pytest.mark.parametrize("engine", ["none", torch.backends.quantized.engine])
def test_integer_kernels_are_used_if_available(tiny_model, tokens_like, tmp_path, monkeypatch, engine):
    model = tiny_model(torch.float32)
    quantize(model, "int8-dynamic", tmp_path / "quantized")
    monkeypatch.setattr(quantize_module, "_has_integer_kernels", lambda: engine != "none")
    loaded = load_quantized(tmp_path / "quantized")
    packed = any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert packed == (engine != "none")
    with torch.no_grad():
        assert loaded(tokens_like(1, 6)).logits.isfinite().all()
    if packed:
        with pytest.raises(RuntimeError, match="packed int8 weights cannot be saved"):
            loaded.save_pretrained(tmp_path / "again")


def test_quantized_files_are_smaller(tiny_model, tmp_path):
    model = tiny_model(torch.float32, hidden_dim=128, ffn_hidden_dim=256, num_heads=2)
    model.save_pretrained(tmp_path / "float32")
    size = (tmp_path / "float32" / "model.safetensors").stat().st_size
    for scheme in SCHEMES:
        quantize(model, scheme, tmp_path / scheme)
        assert (tmp_path / scheme / "model.safetensors").stat().st_size < 0.3 * size


def test_unsupported_quantization_is_refused(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(torch.float32)
    with pytest.raises(ValueError, match=r"quantize='int4': one of"):
        quantize(model, "int4", tmp_path / "x")
    with pytest.raises(ValueError, match="Linear has no plan"):
        quantize(torch.nn.Linear(2, 2), "int8-weight", tmp_path / "x")
    with pytest.raises(ValueError, match="int8-dynamic runs only on a CPU, but this model is on meta: use int8-weight"):
        quantize(model.to("meta"), "int8-dynamic", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_damaged_quantized_weights_are_named(tiny_model, tmp_path):
    folder, changed = tmp_path / "quantized", "model.layers.0.self_attn.q_proj._weight_"
    quantize(tiny_model(torch.float32), "int8-dynamic", folder)
    damage = {
        "weights are NaN or infinite: model.layers.0.self_attn.q_proj.weight": ("scale", lambda t: t * torch.nan),
        "weights of another shape .* model.layers.0.self_attn.q_proj.weight": ("scale", lambda t: t[:3]),
        "weights of another shape than .* model.layers.0.self_attn.q_proj.weight": ("qdata", lambda t: t[:3]),
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for message, (part, change) in damage.items():
        values = {**tensors, changed + part: change(tensors[changed + part]).contiguous()}
        save_file(values, folder / "model.safetensors", metadata)
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)
    values = {name: value for name, value in tensors.items() if name != f"{changed}scale"}
    save_file(values, folder / "model.safetensors", metadata)
    with pytest.raises(ValueError, match="the model cannot be read"):
        load_quantized(folder)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="the model cannot be read"):
        load_quantized(folder)


def test_weights_of_another_model_are_refused(tiny_model, tmp_path):
    model, other = tiny_model(torch.float32), tiny_model(torch.float32, num_layers=6)
    quantize(model, "int8-dynamic", tmp_path / "quantized")
    other.config.save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match="weights are missing"):
        load_quantized(tmp_path / "quantized")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_compiled_packages_continue_from_their_cache(tiny_model, tmp_path):
    model = tiny_model(torch.float32, num_layers=2, plan_span=3, sliding_window=4)
    export = export_aot(model, tmp_path / "aot", (2, 8))
    assert set(export.sizes) == {"encode", "prefill", "decode"}
    kinds = {each.output.split(".")[0] for each in export.differences if each.graph == "decode"}
    assert kinds == {"logits", "present"}
    assert all(each.difference <= TOLERANCE for each in export.differences)
    assert (tmp_path / "aot" / "decode.pt2").is_file() and (tmp_path / "aot" / "config.json").is_file()


def test_without_a_compiler_there_are_no_packages(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(RuntimeError, match="compiled by no-compiler, which is not installed"):
        export_aot(tiny_model(torch.float32), tmp_path / "aot", (1, 8))
    assert not (tmp_path / "aot").exists()
