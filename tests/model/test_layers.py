"""Our layers and cache, each compared with the one of `transformers` that it replaces."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from free_transformer import FreeTransformer
from free_transformer.model.attention import rotary, rotate
from free_transformer.model.cache import GrowingLayer, PlanCache, PlanState
from free_transformer.model.layers import MLP, DecoderLayer, Head, RMSNorm, _RMSNorm, _SwiGLU
from free_transformer.model.losses import chunked_reconstruction_loss, reconstruction_loss
from free_transformer.settings import Settings
from free_transformer.training.optimizers import build_optimizers
from free_transformer.training.step import training_forward

SAMPLED = {"do_sample": True, "max_new_tokens": 9}


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(output, inputs, torch.randn_like(output)))


@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_that_of_llama_with_and_without_gradients(shape, dtype):
    ours, llama = RMSNorm(shape[-1]).to(dtype), LlamaRMSNorm(shape[-1]).to(dtype)
    nn.init.normal_(ours.weight, 1.0, 0.2)
    llama.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(ours(x), llama(x))
    assert torch.equal(ours(x), llama(x))
    for own, expected in zip(gradients(ours(x), x, ours.weight), gradients(llama(x), x, llama.weight), strict=True):
        assert_close(own, expected, atol=1e-4, rtol=1e-5)


def test_gradients_of_norm_rotation_and_gate_are_exact_to_the_second_order():
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, eps=0.1).double()
    nn.init.normal_(norm.weight)
    assert gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))
    angles = torch.randn(1, 3, 4, dtype=torch.float64).repeat(1, 1, 2)
    rotation = rotary(lambda _x, _p: (angles.cos(), angles.sin()), x, torch.arange(3)[None])
    assert gradcheck(lambda x: rotate(x, rotation), (x,))
    up = torch.randn_like(x, requires_grad=True)
    for function, inputs in (
        (lambda x, w: _RMSNorm.apply(x, w, 0.1)[0], (x, norm.weight)),
        (lambda x: _RMSNorm.apply(x, norm.weight.detach(), 0.1)[0], (x,)),  # frozen weights
        (_SwiGLU.apply, (x, up)),
        (lambda x: _SwiGLU.apply(x, up.detach()), (x,)),
    ):
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, inputs)


def test_rotation_is_that_of_llama():
    x = torch.randn(2, 5, 3, 8)
    angles = torch.randn(1, 5, 4).repeat(1, 1, 2)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin(), unsqueeze_dim=2)
    rotation = rotary(lambda _x, _p: (angles.cos(), angles.sin()), x, torch.arange(5)[None])
    assert torch.equal(rotate(x, rotation), expected)
    assert torch.equal(rotate(x.requires_grad_(), rotation), expected)


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_gated_unit_is_that_of_llama(tiny_config, act):
    config = tiny_config(hidden_act=act)
    ours, llama = MLP(config), LlamaMLP(config)
    llama.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(ours(x), llama(x))
    assert torch.equal(ours(x), llama(x))
    for own, expected in zip(
        gradients(ours(x), x, *ours.parameters()), gradients(llama(x), x, *llama.parameters()), strict=True
    ):
        assert_close(own, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("vocabulary", [7, 9000])
def test_loss_in_chunks_is_the_loss_and_has_its_gradients(vocabulary, fused):
    labels = torch.randint(vocabulary, (3, 200))
    labels[0, 100:] = -100
    states, weight = torch.randn(3, 200, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    expected = reconstruction_loss(F.linear(states, weight), labels) / 500
    found = chunked_reconstruction_loss(states, weight, labels, fused) / 500
    assert_close(found, expected, atol=0, rtol=1e-5)
    for own, reference in zip(
        torch.autograd.grad(found, (states, weight)), torch.autograd.grad(expected, (states, weight)), strict=True
    ):
        assert_close(own, reference, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_in_chunks_under_autocast_is_that_of_bf16_logits(fused):
    states, weight, labels = torch.randn(3, 200, 8), torch.randn(9000, 8), torch.randint(9000, (3, 200))
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_reconstruction_loss(states, weight, labels, fused)
        expected = reconstruction_loss(F.linear(states, weight), labels)
    assert_close(found.float(), expected.float(), atol=0, rtol=2e-3)


@pytest.mark.parametrize("span", [1, "sequence"])
def test_training_without_logits_has_the_same_losses_and_gradients(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span, free_bits=0.0), tokens_like(3, 40)
    found = []
    for skip in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        output = model(tokens, labels=tokens, mode="training", skip_logits=skip)
        output.loss.backward()
        found.append((output, [parameter.grad.clone() for parameter in model.parameters()]))
    (whole, of_whole), (without, of_without) = found
    assert without.logits is None
    for name in ("loss", "reconstruction", "kl", "kl_per_bit"):
        assert_close(getattr(without, name), getattr(whole, name))
    for own, expected in zip(of_without, of_whole, strict=True):
        assert_close(own, expected)


def test_training_without_logits_or_labels_is_refused(tiny_model, tokens_like):
    with pytest.raises(ValueError, match="skip_logits=True needs labels"):
        tiny_model()(tokens_like(1, 5), skip_logits=True)


def test_a_head_with_an_adapter_computes_logits_and_then_the_loss(tiny_model, tokens_like):
    class Adapted(nn.Linear):
        pass

    model, tokens = tiny_model(), tokens_like(2, 6)
    expected = model(tokens, labels=tokens, plan=model.sample_plan(2, 6)).loss
    adapted = Adapted(16, 32, bias=False)
    adapted.weight = model.lm_head.weight
    model.lm_head = adapted
    assert type(model.lm_head) is not Head
    torch.manual_seed(0)
    output = model(tokens, labels=tokens, mode="training", skip_logits=True)
    assert output.logits is None
    assert output.reconstruction.isfinite()
    assert expected.isfinite()


class HostReads(TorchDispatchMode):
    """Counts the tensor values that Python reads: on a GPU it would wait for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("span", [1, 4, "sequence"])
def test_a_training_step_reads_no_tensor_value(tiny_config, tokens_like, span):
    model = FreeTransformer(tiny_config(plan_span=span))
    (optimizer,) = build_optimizers(model, Settings.model_validate({"optimizer": {"name": "adamw"}}))
    tokens = tokens_like(2, 12)
    weights = {"kl_weight": torch.tensor(0.5), "free_bits": torch.tensor(0.5)}
    for _ in range(2):  # the optimizer's first step makes its state
        with HostReads() as reads:
            training_forward(model, {"input_ids": tokens, "labels": tokens}, 22, weights)["loss"].backward()
            optimizer.step()
    assert reads.count == 0


@pytest.mark.parametrize("span", [1, 4, "sequence"])
def test_a_generation_step_reads_no_tensor_value(tiny_model, tokens_like, span):
    model, cache = tiny_model(plan_span=span), PlanCache(tiny_model().config)
    state = PlanState(plan=model.sample_plan(2, 1 if span == "sequence" else 4), columns=0)
    with torch.no_grad(), HostReads() as reads:
        for place in range(2):
            position = torch.tensor([[place]])
            model(tokens_like(2, 1), position_ids=position, cache=cache, plan=state)
    assert reads.count == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [2, 4])  # of two the last one receives the plan
@pytest.mark.parametrize("text", ["whole", "padded", "packed"])
def test_the_last_layer_computes_only_the_needed_token(tiny_model, tokens_like, monkeypatch, attention, layers, text):
    model = tiny_model(torch.float32, num_layers=layers, attn_implementation=attention)
    given = {"input_ids": tokens_like(3, 9), "plan": model.sample_plan(3, 9)}
    if text == "padded":
        given["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
        given["attention_mask"][1, :4] = 0
    if text == "packed":
        given["position_ids"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])[None].expand(3, -1)
    rows = []
    layer_type = type(model.model.layers[-1])
    attend = layer_type.attend

    def watched(layer, *arguments, **options):
        output = attend(layer, *arguments, **options)
        if layer is model.model.layers[-1]:
            rows.append(output.shape[1])
        return output

    monkeypatch.setattr(layer_type, "attend", watched)
    with torch.no_grad():
        every = model(**given).logits
        assert_close(model(**given, logits_to_keep=1).logits, every[:, -1:], atol=1e-6, rtol=1e-5)
        assert_close(model(**given, logits_to_keep=2).logits, every[:, -2:], atol=1e-6, rtol=1e-5)
        kept = torch.tensor([1, 5])
        assert_close(model(**given, logits_to_keep=kept).logits, every[:, kept], atol=1e-6, rtol=1e-5)
        if text != "packed":
            for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
                last = model(**given, logits_to_keep=1, cache=cache).logits
                assert_close(last, every[:, -1:], atol=1e-6, rtol=1e-5)
        with_labels = {**given, "labels": given["input_ids"], "skip_logits": True}
        assert_close(model(**with_labels, logits_to_keep=1).loss, model(**with_labels).loss)
    assert rows[:4] == [9, 1, 9, 9]


def test_the_encoder_works_on_plans_not_on_tokens(tiny_model, tokens_like):
    model, seen = tiny_model(plan_span=4), []
    model.encoder.mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    model(tokens_like(2, 12), mode="training")
    assert seen == [3]


def test_hooks_and_adapters_are_called_in_generation(tiny_model, tokens_like):
    model, seen = tiny_model(), []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    model.generate(tokens_like(1, 4), do_sample=False, max_new_tokens=3)
    assert seen == ["k", "up"] * 3


@pytest.mark.parametrize("max_length", [None, 20, 400])
@pytest.mark.parametrize("chunks", [[1] * 300, [5, 1, 1, 290, 1, 1]])
def test_growing_cache_holds_what_the_dynamic_one_does(chunks, max_length):
    growing, dynamic = GrowingLayer(max_length), DynamicCache().layer_class_to_replicate()
    for step, length in enumerate(chunks):
        keys, values = torch.randn(2, 3, 2, length, 4).unbind(0)
        for own, expected in zip(growing.update(keys, values), dynamic.update(keys, values), strict=True):
            assert torch.equal(own, expected)
        if step % 7 == 3:
            for layer in (growing, dynamic):
                layer.crop(-1)
        if step % 11 == 5:
            for layer in (growing, dynamic):
                layer.reorder_cache(torch.tensor([2, 0, 1]))
        assert growing.get_seq_length() == dynamic.get_seq_length()


def test_growing_cache_lets_gradients_through(tiny_config):
    cache = PlanCache(tiny_config())
    keys = torch.randn(1, 2, 3, 4, requires_grad=True)
    cache.update(keys, keys, 0)
    found, _ = cache.update(2 * keys, keys, 0)
    found.sum().backward()
    assert_close(keys.grad, torch.full_like(keys, 3.0))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("span", [1, 4, "sequence"])
def test_a_compiled_step_with_a_static_cache_generates_the_same_text(tiny_model, tokens_like, span, padded):
    model, tokens = tiny_model(plan_span=span), tokens_like(2, 6)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :3] = 0
    compiling = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True
    texts = []
    for cache in ({}, {"cache_implementation": "static", "compile_config": compiling}):
        torch.manual_seed(0)
        texts.append(model.generate(tokens, attention_mask=mask, **SAMPLED, **cache))
    assert torch.equal(*texts)
    assert hasattr(model, "_compiled_call")


def test_only_layers_of_ours_are_in_the_model(tiny_model):
    kinds = {type(module) for module in tiny_model().modules()}
    assert DecoderLayer in kinds
    assert not kinds & {LlamaRMSNorm, LlamaMLP}
