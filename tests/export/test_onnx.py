"""Exports compared with the PyTorch model, in addition to the comparison during export."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from conftest import TINY
from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import byte_tokenizer
from free_transformer.deploy import OnnxFreeTransformer
from free_transformer.evaluation.plan_ops import plan_of_text
from free_transformer.explorer import markup
from free_transformer.explorer.app import create_explorer
from free_transformer.explorer.sources import open_model
from free_transformer.export import onnx as exporting
from free_transformer.export.files import SCHEMES, TOLERANCE
from free_transformer.export.onnx import check_static, export_onnx
from free_transformer.export.onnx_quantize import quantize_graph
from free_transformer.runtime.arrays import sample_tokens
from free_transformer.serving.onnx_batch import OnnxBatch
from rows import write_in_rows

SPAN, BITS, WINDOW = 3, 4, 6


@pytest.fixture(scope="module")
def models():
    def build(**changes):
        torch.manual_seed(0)
        tokens = {"vocab_size": 259, "bos_token_id": 256, "pad_token_id": 258}
        config = FreeTransformerConfig(**{**TINY, **tokens, "num_layers": 2, "latent_dim": BITS, **changes})
        model = FreeTransformer(config).eval()
        with torch.no_grad():
            model.lm_head.weight *= 8  # clear winners, so that rounding cannot choose another token
        return model

    return {
        "dynamic": build(plan_span=SPAN),
        "static": build(plan_span="sequence"),
        "window": build(plan_span=SPAN, max_seq_len=16, sliding_window=WINDOW, plan_strength=1.5),
    }


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory):
    """Graphs of any shape, with weights beside them, and graphs of two texts of twelve tokens, with them inside."""
    folder = tmp_path_factory.mktemp("exports")
    models["dynamic"].gather_prior([{"input_ids": torch.randint(3, 250, (4, 9))}])
    return {
        "dynamic": export_onnx(models["dynamic"], folder / "dynamic", byte_tokenizer(), most_in_one_file=0),
        "static": export_onnx(models["static"], folder / "static", byte_tokenizer(), static=(2, 12)),
        "window": export_onnx(models["window"], folder / "window", byte_tokenizer()),
    }


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    tokens = torch.randint(3, 250, mask.shape)
    return torch.where(mask.bool(), tokens, 258), mask


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_graph_was_compared_with_and_without_padding(exports, kind):
    export = exports[kind]
    graphs = {"training", "encode", "decode"}
    assert {each.graph for each in export.differences} == graphs
    assert {each.padded for each in export.differences} == {False, True}
    assert all(each.difference <= TOLERANCE for each in export.differences if each.output == "logits")
    shapes = {(each.texts, each.tokens) for each in export.differences}
    assert shapes == ({(2, 12)} if kind == "static" else {(1, 2 * SPAN + 9), (3, 8), (2, 4)})
    written = json.loads((export.folder / "export.json").read_text())
    assert written["tolerance"] == TOLERANCE and len(written["differences"]) == len(export.differences)


def test_a_graph_that_differs_is_not_written(models, exports, tmp_path, monkeypatch):
    def wrong_graph(graph, file, export, most_in_one_file):
        shutil.copy(exported / file.name, file)
        shutil.copy(exported / f"{file.name}.data", f"{file}.data")

    exported = exports["dynamic"].folder
    monkeypatch.setattr(exporting, "_write_graph", wrong_graph)
    other = FreeTransformer(models["dynamic"].config).eval()
    with pytest.raises(RuntimeError, match="differs from the model by"):
        export_onnx(other, tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["dynamic", "static", "window"])
@pytest.mark.parametrize("lengths", [(6,), (6, 3)])
def test_greedy_text_is_that_of_pytorch_under_the_same_plan(models, exports, kind, lengths):
    model, exported = models[kind], OnnxFreeTransformer(exports[kind].folder)
    tokens, mask = left_padded(*lengths)
    plan = model.sample_plan(len(lengths), 1 if kind == "static" else 4)
    ours = model.generate(tokens, attention_mask=mask, plan=plan, max_new_tokens=7, do_sample=False)
    theirs = exported.generate(tokens.numpy(), mask.numpy(), plan=plan.numpy(), max_new_tokens=7)
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [(6,), (6, 3), (70, 5)])
def test_long_text_is_that_of_pytorch_under_the_same_plans(models, exports, kind, lengths, monkeypatch):
    model, exported = models[kind], OnnxFreeTransformer(exports[kind].folder)
    if kind == "static":  # its context is as long as the graph
        monkeypatch.setattr(model.config, "max_position_embeddings", 12)
    tokens, mask = left_padded(*lengths)
    plan = model.sample_plan(len(lengths), 1 if kind == "static" else 30)
    options = {"max_new_tokens": 80, "do_sample": False}
    if kind == "static":
        options["plan_changes"] = {21: "0110", 40: "1001"}
    ours = model.generate(tokens, attention_mask=mask, plan=plan, **options)
    if kind == "dynamic":  # the prior of both has other random numbers
        plan = model.generate(tokens, attention_mask=mask, plan=plan, return_dict_in_generate=True, **options)
        ours, plan = plan.sequences, plan.plan
    theirs = exported.generate(tokens.numpy(), mask.numpy(), plan=plan.numpy(), **options)
    assert np.array_equal(ours.numpy(), theirs)


def test_longer_text_of_a_seed_starts_with_the_shorter_one(exports):
    model = OnnxFreeTransformer(exports["dynamic"].folder)
    options = {"do_sample": True, "seed": 5}
    short, long = (model.generate([[256, 65], [256, 66]], max_new_tokens=new, **options) for new in (5, 90))
    assert np.array_equal(long[:, :7], short)


@pytest.mark.parametrize("length", [3, 70])
def test_plans_of_a_long_prompt_are_read_at_its_end(models, exports, length):
    model = OnnxFreeTransformer(exports["dynamic"].folder)
    tokens, mask = left_padded(length, 6)
    limit, spans = 64, (length - 64 + SPAN - 1) // SPAN if length > 64 else 0
    plans = [
        model._complete_plan(
            None, tokens.numpy(), mask.numpy(), 90, "posterior", "uniform", np.random.default_rng(seed)
        )
        for seed in range(2000)
    ]
    seen = tokens[:1, -length:][:, spans * SPAN :]
    assert seen.shape[1] <= limit
    read = models["dynamic"].infer_plan(seen)[0].sigmoid().detach().numpy()
    assert np.mean(plans, axis=0)[0, spans : spans + len(read)] == pytest.approx(read, abs=0.06)
    assert np.mean(plans, axis=0)[1, 2:] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_plans_are_read_as_by_the_model(models, exports, kind):
    tokens, mask = left_padded(7, 4)
    ours = models[kind].infer_plan(tokens, mask).numpy()
    theirs = OnnxFreeTransformer(exports[kind].folder).infer_plan(tokens.numpy(), mask.numpy())
    assert ours.shape == theirs.shape
    used = np.ones(ours.shape[:2], dtype=bool)
    if kind == "dynamic":
        used[1, 2:] = False  # of four tokens the third plan has none
    assert np.abs(ours - theirs)[used].max() < TOLERANCE


def test_text_is_written_where_torch_cannot_be_imported(models, exports):
    plan = models["dynamic"].sample_plan(1, 20)
    prompt = torch.tensor([[256, *b"abc"]])
    ours = models["dynamic"].generate(prompt, plan=plan, max_new_tokens=20, do_sample=False)
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from free_transformer.deploy import OnnxFreeTransformer
model = OnnxFreeTransformer({str(exports["dynamic"].folder)!r}, threads=1)
print(model.generate([[256, *b"abc"]], plan={plan[0].int().tolist()}, max_new_tokens=20).tolist())
print(len(model.write("abc", 2, max_new_tokens=5, do_sample=True, seed=1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(ours.tolist()), "2"]


def test_a_server_generates_each_text_as_alone(exports):
    exported = OnnxFreeTransformer(exports["dynamic"].folder)
    batch = OnnxBatch(exported, max_rows=3)
    lengths, counts = (5, 12, 3, 17, 1), (20, 6, 30, 4, 12)
    rng = np.random.default_rng(0)
    prompts = [[256, *rng.integers(3, 250, length - 1).tolist()] for length in lengths]
    plans = [
        rng.random((batch.num_plans(length + count), BITS)) < 0.5 for length, count in zip(lengths, counts, strict=True)
    ]
    written = write_in_rows(batch, prompts, plans, list(counts))
    for prompt, plan, text, count in zip(prompts, plans, written, counts, strict=True):
        alone = exported.generate([prompt], plan=plan, max_new_tokens=count, eos_token_id=())
        assert alone[0, len(prompt) :].tolist() == text
    with pytest.raises(ValueError, match="has fixed sizes"):
        OnnxBatch(OnnxFreeTransformer(exports["static"].folder))


def test_a_sliding_window_bounds_the_cache_and_not_the_length(models, exports, recwarn):
    window, model, export = WINDOW, models["window"], exports["window"]
    assert all(each.difference <= TOLERANCE for each in export.differences if each.output == "logits")
    exported = OnnxFreeTransformer(export.folder)
    tokens, mask = left_padded(5, 9, 12)
    plan, count = model.sample_plan(3, 30), 70
    options = {"plan": plan, "max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens, attention_mask=mask, **options)
    widths = []
    run = exported.run
    exported.run = lambda graph, inputs, past=(): widths.append(past[0].shape()[2]) or run(graph, inputs, past)
    ours = exported.generate(tokens, mask, plan=plan.numpy(), max_new_tokens=count, eos_token_id=())
    assert ours.tolist() == expected.tolist()
    assert max(widths) <= max(2 * window, 12)
    batch = OnnxBatch(exported, max_rows=3, max_length=100)
    lengths, counts = (5, 12, 3, 17, 1), (40, 6, 30, 4, 12)
    prompts = [[256, *torch.randint(3, 250, (length - 1,)).tolist()] for length in lengths]
    widths.clear()
    written = write_in_rows(batch, prompts, [plan[0].numpy()] * 5, list(counts))
    assert max(widths) <= max(2 * window, 17)
    for prompt, text, new in zip(prompts, written, counts, strict=True):
        alone = model.generate(torch.tensor([prompt]), **{**options, "plan": plan[0], "max_new_tokens": new})
        assert alone[0, len(prompt) :].tolist() == text
    assert not [each for each in recwarn if "built for 16" in str(each.message)]


def test_a_server_runs_where_torch_cannot_be_imported(models, exports):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
sys.argv = ["free-transformer", "serve", "--onnx", {str(exports["dynamic"].folder)!r}, "--port", "0", "--name", "tiny"]
from free_transformer.cli.main import main
main()
"""
    plan = models["dynamic"].sample_plan(1, 8)
    ours = models["dynamic"].generate(torch.tensor([[256, *b"abc"]]), plan=plan, max_new_tokens=20, do_sample=False)
    body = {"prompt": "abc", "temperature": 0, "max_tokens": 20, "plan": plan[0].int().tolist()}
    with subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True) as server:
        try:
            address = re.findall(r"http://\S+/v1", server.stdout.readline())[0]
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
            text = json.loads(urllib.request.urlopen(request).read())["choices"][0]["text"]
        finally:
            server.terminate()
    assert text == byte_tokenizer().decode(ours[0, 4:], skip_special_tokens=True)


def test_shapes_are_named_and_large_weights_are_stored_beside_their_graph(exports):
    folder = exports["dynamic"].folder
    graph = onnx.load(folder / "decode.onnx", load_external_data=False)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.graph.input, *graph.graph.output]
    }
    assert shapes["input_ids"] == ["batch", "tokens"]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["plan"] == ["batch", "plans", BITS]
    assert shapes["past.0.key"] == ["batch", 1, "past", 8]
    assert shapes["logits"] == ["batch", "asked", 259]
    assert graph.opset_import[0].version == exporting.OPSET
    operators = Counter(node.op_type for node in graph.graph.node)
    assert operators["Attention"] == 2
    assert operators["RMSNormalization"] == 2 * 2 + 1 + 1  # of two layers, of X + R, and the last
    outside = [each.name for each in graph.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    assert len(outside) > 10 and (folder / "decode.onnx.data").stat().st_size > 10_000
    assert not list(exports["static"].folder.glob("*.data"))


def test_static_graphs_have_fixed_shapes_and_operators_of_tensorrt(exports, tmp_path, monkeypatch):
    folder = exports["static"].folder
    for name in ("training", "encode", "prefill", "decode"):
        check_static(folder / f"{name}.onnx")
    with pytest.raises(RuntimeError, match="not fixed"):
        check_static(exports["dynamic"].folder / "decode.onnx")
    monkeypatch.setattr(exporting, "TENSORRT_OPERATORS", {"MatMul"})
    with pytest.raises(RuntimeError, match="operators that TensorRT may not have: Add"):
        check_static(folder / "decode.onnx")


def test_a_static_export_says_what_it_holds(exports):
    model = OnnxFreeTransformer(exports["static"].folder)
    with pytest.raises(ValueError, match="3 texts of 2 tokens"):
        model.generate([[1, 2]] * 3, plan=np.ones((1, BITS)), max_new_tokens=1)
    assert model.generate([[1, 2, 3, 4]], max_new_tokens=9).shape == (1, 13)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_in_the_place_of_matrices(models, exports, tmp_path, scheme, capfd):
    folder = tmp_path / "quantized"
    shutil.copytree(exports["dynamic"].folder, folder)
    quantize_graph(folder / "decode.onnx", scheme)
    assert capfd.readouterr() == ("", "")  # onnxruntime would tell of every tensor
    operators = {node.op_type for node in onnx.load(folder / "decode.onnx").graph.node}
    assert {"int8-weight": "MatMulNBits", "int8-dynamic": "MatMulInteger"}[scheme] in operators
    tokens, mask = left_padded(7, 4)
    plan = models["dynamic"].sample_plan(2, 3)
    logits = models["dynamic"](tokens, attention_mask=mask, plan=plan).logits[:, -3:].detach().numpy()
    quantized = OnnxFreeTransformer(folder).read_in_pieces(tokens.numpy(), mask.numpy(), plan.numpy())
    assert 0 < np.abs(logits - quantized).max() < 0.2 * logits.std()


def test_sampling_follows_the_seed_and_the_options(exports):
    model = OnnxFreeTransformer(exports["dynamic"].folder)
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 5}
    assert np.array_equal(model.generate([[256, 65]], **options), model.generate([[256, 65]], **options))
    assert not np.array_equal(
        model.generate([[256, 65]], **options), model.generate([[256, 65]], **{**options, "seed": 6})
    )
    greedy = model.generate([[256, 65]], plan=np.ones((5, BITS)), max_new_tokens=12)
    top = model.generate([[256, 65]], plan=np.ones((5, BITS)), **{**options, "top_k": 1})
    assert np.array_equal(greedy, top)
    ends = int(greedy[0, 4])
    ended = model.generate([[256, 65]], plan=np.ones((5, BITS)), max_new_tokens=12, eos_token_id=ends)
    assert np.array_equal(ended, greedy[:, : greedy[0].tolist().index(ends, 2) + 1])


def test_samples_follow_the_filtered_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])).repeat(20000, 0)
    rng = np.random.default_rng(0)

    def shares(top_k: int, top_p: float) -> list[float]:
        settings = (np.full(len(logits), each) for each in (1.0, top_k, top_p))
        drawn = sample_tokens(logits, *settings, rng.random(len(logits)))
        return [float(share) for share in np.bincount(drawn, minlength=4) / len(logits)]

    assert shares(0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert shares(2, 1.0) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert shares(0, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert shares(0, 0.4) == [1, 0, 0, 0]


def test_missing_plans_come_from_the_prompt_and_the_prior(models, exports):
    model = OnnxFreeTransformer(exports["dynamic"].folder)
    tokens, mask = left_padded(6, 3)
    logits = models["dynamic"].infer_plan(tokens, mask)

    def share(count: int, **options) -> np.ndarray:
        plans = [
            model._complete_plan(None, tokens.numpy(), mask.numpy(), 9, rng=np.random.default_rng(seed), **options)
            for seed in range(count)
        ]
        return np.mean(plans, axis=0)

    drawn = share(2000, prompt_plan="posterior", prior="uniform")
    assert drawn[0, :2] == pytest.approx(logits[0].sigmoid().numpy(), abs=0.05)
    assert drawn[1, 0] == pytest.approx(logits[1, 0].sigmoid().numpy(), abs=0.05)
    assert drawn[1, 1:] == pytest.approx(0.5, abs=0.05)
    aggregate = models["dynamic"].plan_prior.sample(20000, 1, "aggregate").float().mean((0, 1))
    assert share(2000, prompt_plan="prior", prior="aggregate")[:, 2] == pytest.approx(aggregate.repeat(2, 1), abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": [[1, 0]]}, r"plan of shape \(1, 1, 2\): expected \(P, 4\) or \(1, P, 4\)"),
        ({"plan": [[1, 0, 2, 0]]}, "values other than bits"),
        ({"prompt_plan": "mine"}, "one of .'posterior', 'prior'"),
        ({"prior": "mine"}, "one of .'uniform', 'aggregate'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: an integer of at least 1"),
    ],
)
def test_bad_options_are_told(exports, options, message):
    with pytest.raises(ValueError, match=message):
        OnnxFreeTransformer(exports["dynamic"].folder).generate([[1, 2]], **options)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("text", ["an example", "".join(map(chr, range(32, 127))) * 2])
def test_the_plan_of_an_example_is_read_as_by_the_command_line(models, exports, monkeypatch, kind, text):
    model, exported = models[kind], OnnxFreeTransformer(exports[kind].folder)
    if kind == "static":
        monkeypatch.setattr(model.config, "max_position_embeddings", 12)
    assert np.array_equal(exported.plan_of_text(text), plan_of_text(model, byte_tokenizer(), text).numpy())


def test_bad_exports_are_told(models, exports, tmp_path):
    with pytest.raises(ValueError, match="not an export"):
        OnnxFreeTransformer(tmp_path)
    with pytest.raises(ValueError, match="provider 'NoExecutionProvider': this onnxruntime has"):
        OnnxFreeTransformer(exports["dynamic"].folder, providers=["NoExecutionProvider"])
    with pytest.raises(ValueError, match=r"tokens of shape \(2,\)"):
        OnnxFreeTransformer(exports["dynamic"].folder).generate([1, 2])
    with pytest.raises(ValueError, match="has no aggregate prior"):
        OnnxFreeTransformer(exports["static"].folder).sample_plan(1, prior="aggregate")
    with pytest.raises(ValueError, match="one of"):
        export_onnx(models["dynamic"], tmp_path / "x", quantize="int4")
    with pytest.raises(ValueError, match="leave quantize out"):
        export_onnx(models["dynamic"], tmp_path / "x", static=(1, 8), quantize="int8-weight")
    with pytest.raises(ValueError, match="at least 1 text, and from 4 to 64 tokens"):
        export_onnx(models["dynamic"], tmp_path / "x", static=(1, 2))
    with pytest.raises(ValueError, match="Linear has no plan"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_page_of_plans_shows_an_export(exports):
    app = create_explorer(open_model(exports["dynamic"].folder))
    explored = app.state.explored
    choices = replace(explored.start(), prompt="ab", length=6, temperature=0.0)

    async def texts() -> str:
        return [grid async for grid in explored.grid(choices, False, {})][-1]

    grid = asyncio.run(texts())
    explored.engine.stop()
    assert grid.count("<div class=ft-cell>") == 16 and "ft-failure" not in grid
    model = OnnxFreeTransformer(exports["dynamic"].folder)
    plan = choices.bits(explored.batch)[: model.num_plans(3 + 6)]
    (tokens,) = model.generate([[256, *b"ab"]], plan=plan, max_new_tokens=6)
    assert markup.escape(byte_tokenizer().decode(tokens[3:], skip_special_tokens=True)) in grid
