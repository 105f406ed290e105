"""Damaged models are refused by name, and a model that has been loaded does not depend on its files."""

import json
import pickle
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_serving import build_model, save_model
from transformers import LlamaConfig, LlamaForCausalLM

from free_transformer import FreeTransformer
from free_transformer.cli.main import main
from free_transformer.data import byte_tokenizer
from free_transformer.deploy import OnnxFreeTransformer
from free_transformer.export.onnx import export_onnx
from free_transformer.export.quantize import quantize
from free_transformer.runs.load_model import load_pretrained
from free_transformer.serving.onnx_batch import OnnxBatch
from free_transformer.serving.torch_batch import TorchBatch


class Evil:
    def __reduce__(self):
        return print, ("code of a pickle",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Free Transformer, one with 8-bit weights, and a Llama."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = save_model(folder / "free", plan_span="sequence", max_seq_len=64), byte_tokenizer()
    quantize(model, "int8-dynamic", folder / "quantized", tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["free-transformer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        assert "code of a pickle" not in shown.out + shown.err
        return stopped.value.code or 0, shown.err

    return run


def changed(folder, change) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata)


def half(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_shards(folder, index: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


def as_pickle(folder, contents: bytes | None = None) -> None:
    if contents is None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        half(folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(contents)
    (folder / "model.safetensors").unlink()


LAYER = "model.layers.1.mlp.up_proj.weight"
NOT_FINITE = torch.full((32,), torch.nan)
# what happens to the files, and the names in the message
DAMAGE = {
    "missing": (lambda folder: changed(folder, lambda t: t.pop(LAYER)), LAYER),
    "missing of the plan": (lambda folder: changed(folder, lambda t: t.pop("encoder.query")), "encoder.query"),
    "renamed": (lambda folder: changed(folder, lambda t: t.update({"x": t.pop(LAYER)})), LAYER),
    "another shape": (lambda folder: changed(folder, lambda t: t.update({LAYER: torch.ones(7)})), LAYER),
    "NaN": (lambda folder: changed(folder, lambda t: t["model.norm.weight"].fill_(torch.nan)), "model.norm.weight"),
    "infinite": (lambda folder: changed(folder, lambda t: t[LAYER].view(-1)[-1:].fill_(torch.inf)), LAYER),
    "cut short": (lambda folder: half(folder / "model.safetensors"), "{folder}"),
    "noise": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 5000), "{folder}"),
    "gone": (lambda folder: (folder / "model.safetensors").unlink(), "{folder}"),
    "index cut short": (lambda folder: as_shards(folder, '{"weight_map": '), "{folder}"),
    "index of nothing": (lambda folder: as_shards(folder, "{}"), "{folder}"),
    "index of others": (
        lambda folder: as_shards(folder, json.dumps({"weight_map": {LAYER: "x.safetensors"}})),
        "{folder}",
    ),
    "half a pickle": (as_pickle, "{folder}"),
    "a pickle's code": (lambda folder: as_pickle(folder, pickle.dumps({"weight": Evil()})), "{folder}"),
    "configuration": (lambda folder: (folder / "config.json").write_text("{"), "{folder}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_named_in_one_line(folders, tmp_path, command, damage):
    change, named = DAMAGE[damage]
    shutil.copytree(folders / "free", tmp_path / "copy")
    change(tmp_path / "copy")
    named = named.format(folder=tmp_path / "copy")
    for line in (["generate", "--max-new-tokens", 1], ["export", "--to", "torch", "--quantize", "int8-dynamic"]):
        status, said = command(line[0], tmp_path / "copy", *line[1:])
        assert status == 2 and named in said and said.count("\n") == 1, (line[0], said)
    assert not (tmp_path / "copy" / "torch-int8-dynamic").exists()


@pytest.mark.parametrize(
    "damage", ["missing", "another shape", "NaN", "cut short", "index of nothing", "a pickle's code"]
)
def test_a_damaged_llama_is_not_converted(folders, tmp_path, command, damage):
    change, named = DAMAGE[damage]
    shutil.copytree(folders / "llama", tmp_path / "copy")
    change(tmp_path / "copy")
    status, said = command("convert", tmp_path / "copy", tmp_path / "out", "--no-check")
    assert status == 2 and named.format(folder=tmp_path / "copy") in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_quantized_model_is_named(folders, tmp_path, command):
    damage = {
        "model.layers.0.self_attn.q_proj._weight_scale": "the model cannot be read",
        "model.norm.weight": "weights are missing: model.norm.weight",
    }
    for name, message in damage.items():
        shutil.copytree(folders / "quantized", tmp_path / name)
        changed(tmp_path / name, lambda tensors, name=name: tensors.pop(name))
        status, said = command("generate", tmp_path / name)
        assert status == 2 and message in said and said.count("\n") == 1


def test_eight_bits_are_not_made_of_eight_bits(folders, tmp_path, command):
    for line in (["--to", "onnx"], ["--to", "torch", "--quantize", "int8-dynamic"], ["--static", 1, 16]):
        status, said = command("export", folders / "quantized", *line, "--out", tmp_path / "out")
        assert status == 2 and "8-bit weights already" in said and said.count("\n") == 1


def test_a_tokenizer_of_another_vocabulary_is_refused(folders, tmp_path, command):
    shutil.copytree(folders / "free", tmp_path / "copy")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(tmp_path / "copy")
    for name in ("generate", "serve"):
        status, said = command(name, tmp_path / "copy", *(["--port", 0] if name == "serve" else []))
        assert status == 2 and "token ids up to 260, but the model's vocabulary has 259 tokens" in said


def test_a_model_does_not_depend_on_its_files(folders, tmp_path):
    shutil.copytree(folders / "free", tmp_path / "copy")
    model = load_pretrained(tmp_path / "copy", FreeTransformer)
    tokens, plan = torch.tensor([[256, 97, 98]]), torch.zeros(1, 4, dtype=torch.bool)
    before = model(tokens, plan=plan).logits
    file = tmp_path / "copy" / "model.safetensors"
    with file.open("r+b") as opened:  # in place, as cp and rsync --inplace do
        opened.write(bytes(file.stat().st_size))
        opened.truncate(0)
    assert torch.equal(model(tokens, plan=plan).logits, before)
    tied = build_model(plan_span="sequence", tie_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    loaded = load_pretrained(tmp_path / "tied", FreeTransformer)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_plain_llama_may_lack_what_makes_a_plan(folders):
    assert load_pretrained(folders / "llama", FreeTransformer).config.latent_dim
    assert not hasattr(load_pretrained(folders / "llama"), "infer_plan")


@pytest.fixture(scope="module")
def export(folders):
    model = load_pretrained(folders / "free")
    return export_onnx(model, folders / "onnx", byte_tokenizer(), most_in_one_file=0).folder


@pytest.mark.parametrize("name", ["encode.onnx", "decode.onnx", "config.json", "decode.onnx.data"])
@pytest.mark.parametrize("damage", ["gone", "half"])
def test_a_damaged_export_is_named(export, tmp_path, command, name, damage):
    shutil.copytree(export, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.unlink() if damage == "gone" else half(file)
    for line in (["generate", tmp_path / "copy", "--prompt", "a"], ["serve", "--onnx", tmp_path / "copy", "--port", 0]):
        status, said = command(*line)
        assert status == 2 and str(tmp_path / "copy" / name.removesuffix(".data")) in said and said.count("\n") == 1, (
            said
        )


def test_an_export_does_not_depend_on_its_files(export, tmp_path):
    shutil.copytree(export, tmp_path / "copy")
    model = OnnxFreeTransformer(tmp_path / "copy")
    model.load()
    options = {"plan": [[0, 1, 1, 0]], "max_new_tokens": 8}
    before = model.generate([[256, 97]], **options).tolist()
    for file in (tmp_path / "copy").glob("*.onnx*"):
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
            opened.truncate(0)
    assert model.generate([[256, 97]], **options).tolist() == before


@pytest.mark.slow  # another export
def test_graphs_of_another_model_are_not_served(export, tmp_path, command):
    export_onnx(build_model(plan_span="sequence", hidden_dim=64, max_seq_len=64), tmp_path / "other", byte_tokenizer())
    shutil.copytree(export, tmp_path / "copy")
    (tmp_path / "copy" / "decode.onnx.data").unlink()
    shutil.copyfile(tmp_path / "other" / "decode.onnx", tmp_path / "copy" / "decode.onnx")
    status, said = command("serve", "--onnx", tmp_path / "copy", "--port", 0)
    assert status == 2 and "decode.onnx" in said and said.count("\n") == 1, said


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_server_does_not_start_with_logits_that_are_not_finite(folders, export, kind):
    batch = TorchBatch(load_pretrained(folders / "free"), byte_tokenizer())
    if kind == "onnx":
        batch = OnnxBatch(OnnxFreeTransformer(export))
    batch.warm_up()
    assert batch.rows == 0
    step = batch.step
    batch.step = lambda tokens: step(tokens) * torch.nan if kind == "torch" else step(tokens) * float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        batch.warm_up()
