import shutil

import pytest
import torch

from free_transformer import FreeTransformer
from free_transformer.data import byte_tokenizer
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.export.aot import export_aot
from free_transformer.export.files import SCHEMES, TOLERANCE
from free_transformer.export.quantize import load_quantized, quantize
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
def test_a_quantized_model_writes_and_is_judged(model, tokens_like, tmp_path, scheme):
    loaded = quantize(model, scheme, tmp_path / "quantized")
    tokens = tokens_like(2, 5)
    written = loaded.generate(tokens, plan=model.sample_plan(2, num_plans(3, 12)), max_new_tokens=7, do_sample=False)
    assert written.shape == (2, 12)
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


def test_int8_weight_is_read_by_from_pretrained(model, tokens_like, tmp_path):
    quantized = quantize(model, "int8-weight", tmp_path / "quantized")
    loaded = FreeTransformer.from_pretrained(tmp_path / "quantized").eval()
    tokens, plan = tokens_like(1, 6), model.sample_plan(1, 2)
    with torch.no_grad():
        assert torch.equal(quantized(tokens, plan=plan).logits, loaded(tokens, plan=plan).logits)


def test_quantized_files_are_smaller(tiny_model, tmp_path):
    model = tiny_model(torch.float32, hidden_dim=128, ffn_hidden_dim=256, num_heads=2)
    model.save_pretrained(tmp_path / "float32")
    size = (tmp_path / "float32" / "model.safetensors").stat().st_size
    for scheme in SCHEMES:
        quantize(model, scheme, tmp_path / scheme)
        assert (tmp_path / scheme / "model.safetensors").stat().st_size < 0.3 * size


def test_what_cannot_be_quantized_is_told(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(torch.float32)
    with pytest.raises(ValueError, match=r"quantize='int4': one of"):
        quantize(model, "int4", tmp_path / "x")
    with pytest.raises(ValueError, match="Linear has no plan"):
        quantize(torch.nn.Linear(2, 2), "int8-weight", tmp_path / "x")
    with pytest.raises(ValueError, match="int8-dynamic runs on a CPU alone, this model is on meta: use int8-weight"):
        quantize(model.to("meta"), "int8-dynamic", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model = tiny_model(torch.float32)
    quantize(model, "int8-dynamic", tmp_path / "y")
    other = tiny_model(torch.float32, num_layers=2)
    other.config.save_pretrained(tmp_path / "y")
    with pytest.raises(ValueError, match="the weights are of another model"):
        load_quantized(tmp_path / "y")
    model.config.save_pretrained(tmp_path / "y")
    load_quantized(tmp_path / "y")
    (tmp_path / "y" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="the model cannot be read"):
        load_quantized(tmp_path / "y")


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_packages_of_machine_code_go_on_from_their_cache(tiny_model, tmp_path):
    export = export_aot(tiny_model(torch.float32, num_layers=2, plan_span=3), tmp_path / "aot", (2, 8))
    assert set(export.sizes) == {"encode", "prefill", "decode"}
    kinds = {each.output.split(".")[0] for each in export.differences if each.graph == "decode"}
    assert kinds == {"logits", "present"}
    assert all(each.difference <= TOLERANCE for each in export.differences)
    assert (tmp_path / "aot" / "decode.pt2").is_file() and (tmp_path / "aot" / "config.json").is_file()


def test_without_a_compiler_there_are_no_packages(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(RuntimeError, match="compiled by no-compiler, which is not here"):
        export_aot(tiny_model(torch.float32), tmp_path / "aot", (1, 8))
    assert not (tmp_path / "aot").exists()
