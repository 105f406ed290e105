import itertools
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from free_transformer import FreeTransformer, build_baseline, codes_to_bits
from free_transformer.model.attention import rotary
from free_transformer.model.layout import num_plans

SPANS = [1, 4, "sequence"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# The eager softmax is in fp32, where the float64 mask of a row with nothing to read overflows.
DTYPES = {"sdpa": torch.float64, "eager": torch.float32}


class CountingEncoder(nn.Module):
    """A custom encoder: the mean of the tokens that a plan may read, and a buffer that no file holds."""

    def __init__(self, config):
        super().__init__()
        self.readout = nn.Linear(config.hidden_size, config.latent_dim)
        self.register_buffer("scale", torch.arange(1.0, config.latent_dim + 1), persistent=False)

    def forward(self, hidden_states, mask):
        mean = mask.to(hidden_states.dtype) @ hidden_states / mask.sum(-1, keepdim=True)
        return self.readout(mean) * self.scale


def random_plan(model: FreeTransformer, batch: int, tokens: int) -> torch.Tensor:
    return model.sample_plan(batch, num_plans(model.config.plan_span, tokens))


def certain(model: FreeTransformer) -> FreeTransformer:
    """Uses the most likely plan instead of a sample."""
    model.plan_mapper.forward = lambda plan_logits, generator=None: plan_logits > 0
    return model


def llama_of(model: FreeTransformer) -> LlamaForCausalLM:
    llama = LlamaForCausalLM(model.config.to_llama()).to(model.dtype).eval()
    llama.load_state_dict({k: v for k, v in model.state_dict().items() if "plan" not in k and "encoder" not in k})
    return llama


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(each, kind)()) for each in (model, other))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def padding_mask(side: str, lengths: list[int], total: int) -> torch.Tensor:
    column = torch.arange(total)[None]
    lengths = torch.tensor(lengths)[:, None]
    return (column < lengths if side == "right" else column >= total - lengths).long()


@pytest.mark.parametrize("changes", [{}, {"num_layers": 1}, {"num_layers": 3, "injection_layers": [1, 2]}])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_zero_plan_vector_matches_llama(tiny_model, tokens_like, padding, changes):
    model = tiny_model(torch.float32, table_init="zero", **changes)
    tokens, mask = tokens_like(3, 9), torch.ones(3, 9, dtype=torch.long)
    if padding:
        mask = padding_mask(padding, [9, 4, 6], 9)
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask).logits
        expected = llama_of(model)(tokens, attention_mask=mask).logits
    assert_close(ours[mask.bool()], expected[mask.bool()], **CLOSE)


def test_a_plan_that_is_not_zero_changes_the_logits(tiny_model, tokens_like):
    model, tokens = tiny_model(), tokens_like(1, 6)
    zero, other = torch.zeros(6, 4, dtype=torch.bool), torch.ones(6, 4, dtype=torch.bool)
    assert (model(tokens, plan=zero).logits - model(tokens, plan=other).logits).abs().max() > 0.01


def rotated(heads: torch.Tensor, theta: float) -> torch.Tensor:
    """(B, heads, T, head_dim) turned by its position, as pairs (x_i, x_{i + head_dim / 2}) of the complex plane."""
    length, half = heads.shape[-2], heads.shape[-1] // 2
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def test_injection_takes_queries_from_the_stream_and_keys_and_values_from_the_stream_and_the_plan(tiny_model):
    model = tiny_model(rope_theta=100.0)
    layer = model.model.layers[2]
    layer.input_layernorm.weight.data.uniform_(0.5, 2)
    x, r = (torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(2))

    def norm(states, weight):
        return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def heads(states, projection):
        return (states @ projection.weight.T).unflatten(-1, (-1, 8)).transpose(1, 2)

    attention, mlp, weight = layer.self_attn, layer.mlp, layer.input_layernorm.weight
    query = rotated(heads(norm(x, weight), attention.q_proj), 100.0)
    key = rotated(heads(norm(x + r, weight), attention.k_proj), 100.0)
    scores = (query @ key.mT) / 8**0.5 + torch.full((5, 5), -torch.inf).triu(1)
    attended = (scores.softmax(-1) @ heads(norm(x + r, weight), attention.v_proj)).transpose(1, 2).flatten(2)
    middle = x + attended @ attention.o_proj.weight.T
    inside = norm(middle, layer.post_attention_layernorm.weight)
    gated = nn.functional.silu(inside @ mlp.gate_proj.weight.T) * (inside @ mlp.up_proj.weight.T)
    expected = middle + gated @ mlp.down_proj.weight.T

    positions = rotary(model.model.rotary_emb, x, torch.arange(5)[None])
    assert_close(layer(x, plan_states=r, position_embeddings=positions), expected, **CLOSE)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
def test_a_llama_checkpoint_loads_with_its_own_logits(tiny_config, tokens_like, tmp_path, changes):
    llama = build_baseline(tiny_config(rope_theta=500.0, **changes)).eval()
    llama.save_pretrained(tmp_path)
    tokens = tokens_like(2, 7)
    model = FreeTransformer.from_pretrained(tmp_path, latent_dim=4, plan_span=4)
    assert not model.training
    assert model.config.plan_span == 4
    with torch.no_grad():
        assert_close(model(tokens).logits, llama(tokens).logits, **CLOSE)
        assert_close(model(tokens, mode="training").logits, llama(tokens).logits, **CLOSE)


def test_new_parts_of_a_llama_checkpoint_start_as_in_a_new_model(tiny_config, tmp_path):
    build_baseline(tiny_config()).save_pretrained(tmp_path)
    fresh = FreeTransformer(tiny_config(table_init="zero"))
    for _ in range(2):
        model = FreeTransformer.from_pretrained(tmp_path, latent_dim=4)
        assert not model.plan_table.weight.any()
        for name, parameter in model.encoder.named_parameters():
            new = fresh.encoder.get_parameter(name)
            assert parameter.isfinite().all()
            assert parameter.abs().max() <= 4 * new.abs().max(), name
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, fresh.get_buffer(name)), name


def test_weights_come_back_through_two_reloads(tiny_model, tokens_like, tmp_path):
    model, tokens = tiny_model(torch.float32, latent_dim=9, code_bits=4), tokens_like(2, 6)
    plan = random_plan(model, 2, 6)
    model.save_pretrained(tmp_path / "first")
    for loader in (FreeTransformer, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "first")
        assert type(loaded) is FreeTransformer
        loaded.save_pretrained(tmp_path / "second")
        for reloaded in (loaded, loader.from_pretrained(tmp_path / "second")):
            assert_same_tensors(reloaded, model)
            assert torch.equal(reloaded(tokens, plan=plan).logits, model(tokens, plan=plan).logits)
            # A copy, whose memory is aligned as the model's: a product with one row may round otherwise elsewhere.
            assert torch.equal(deepcopy(reloaded).infer_plan(tokens), model.infer_plan(tokens))


def test_tied_embeddings_stay_tied(tiny_model, tmp_path):
    model = tiny_model(torch.float32, tie_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = FreeTransformer.from_pretrained(tmp_path)
    for either in (model, loaded):
        assert either.lm_head.weight is either.model.embed_tokens.weight
    assert_same_tensors(loaded, model)


@pytest.mark.parametrize("tied", [False, True])
def test_free_transformer_and_baseline_start_alike(tiny_config, tied):
    config = tiny_config(hidden_dim=64, vocab_size=128, tie_embeddings=tied)
    started = dict(FreeTransformer(config).named_parameters())
    for name, parameter in build_baseline(config).named_parameters():
        rms, expected = (tensor.detach().square().mean().sqrt().item() for tensor in (started[name], parameter))
        assert rms == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("tied", [False, True])
def test_plan_starts_at_the_scale_of_the_stream_that_it_joins(tiny_config, tokens_like, tied):
    model, tokens = FreeTransformer(tiny_config(hidden_dim=64, latent_dim=8, tie_embeddings=tied)), tokens_like(8, 16)
    stream = model.lower_layers(tokens).hidden_states.square().mean().sqrt().item()
    plan = model.plan_table(model.sample_plan(8, 16)).square().mean().sqrt().item()
    assert 0.5 < plan / stream < 1.5
    assert 0.5 < model(tokens).logits.std() < 2


def test_residual_outputs_of_the_encoder_start_as_those_of_the_decoder(tiny_config):
    model = FreeTransformer(tiny_config(hidden_dim=64, ffn_hidden_dim=128))
    baseline = build_baseline(model.config).model.layers[0]
    for ours, theirs in (
        (model.encoder.attention.o_proj, baseline.self_attn.o_proj),
        (model.encoder.mlp.down_proj, baseline.mlp.down_proj),
    ):
        assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.15)


def test_readout_starts_small(tiny_config):
    model = FreeTransformer(tiny_config(hidden_dim=64, latent_dim=16, readout_init_scale=0.1))
    assert model.encoder.readout.weight.std().item() == pytest.approx(0.1 / 8, rel=0.15)
    assert not model.encoder.readout.bias.any()


def test_custom_encoder_keeps_its_own_start_and_is_used(tiny_config, tokens_like):
    config = tiny_config()
    encoder = CountingEncoder(config)
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = FreeTransformer(config, encoder=encoder)
    assert all(torch.equal(model.encoder.state_dict()[name], value) for name, value in start.items())
    tokens = tokens_like(2, 5)
    expected = encoder(model.lower_layers(tokens).hidden_states, torch.ones(2, 5, 5))
    assert_close(model.infer_plan(tokens), expected.detach())


def test_custom_encoder_is_saved_and_restored(tiny_config, tokens_like, tmp_path):
    config = tiny_config()
    model, tokens = FreeTransformer(config, encoder=CountingEncoder(config)).eval(), tokens_like(2, 5)
    model.save_pretrained(tmp_path / "0")
    for again in range(2):
        loaded = FreeTransformer.from_pretrained(tmp_path / str(again), encoder=CountingEncoder(config))
        assert_same_tensors(loaded, model)
        # A copy, whose memory is aligned as the model's: a product with one row may round otherwise elsewhere.
        assert torch.equal(deepcopy(loaded).infer_plan(tokens), model.infer_plan(tokens))
        loaded.save_pretrained(tmp_path / str(again + 1))


@pytest.mark.parametrize("loader", [FreeTransformer, AutoModelForCausalLM])
def test_missing_custom_encoder_is_an_error(tiny_config, tmp_path, loader):
    config = tiny_config()
    FreeTransformer(config, encoder=CountingEncoder(config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder=CountingEncoder\(\.\.\.\)"):
        loader.from_pretrained(tmp_path)


def test_a_configuration_can_be_used_again_without_the_custom_encoder(tiny_config):
    config = tiny_config()
    FreeTransformer(config, encoder=CountingEncoder(config))
    FreeTransformer(config)


def test_encoder_that_returns_another_shape_is_refused(tiny_config, tokens_like):
    config = tiny_config(plan_span="sequence")
    model = FreeTransformer(config, encoder=CountingEncoder(config))
    model.encoder.forward = lambda hidden_states, mask: hidden_states
    with pytest.raises(ValueError, match=r"\(2, 5, 16\): expected \(B, P, H\) = \(2, 1, 4\)"):
        model.infer_plan(tokens_like(2, 5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_posteriors_differ_between_the_positions_of_a_sequence(tiny_model, tokens_like, attention):
    model = tiny_model(plan_span=1)
    model.set_attn_implementation(attention)
    plan_logits = model.infer_plan(tokens_like(1, 6))[0]
    for one, other in itertools.combinations(plan_logits, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("span", SPANS)
def test_encoder_sees_the_future(tiny_model, tokens_like, span, attention):
    model = tiny_model(DTYPES[attention], plan_span=span)
    model.set_attn_implementation(attention)
    tokens = tokens_like(1, 9)
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % 32
    difference = (model.infer_plan(tokens) - model.infer_plan(changed))[0, 0]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("span", SPANS)
def test_padding_changes_nothing(tiny_model, tokens_like, span, side, attention):
    model = tiny_model(DTYPES[attention], plan_span=span)
    model.set_attn_implementation(attention)
    lengths, total = [10, 7, 1], 10
    tokens, mask = tokens_like(3, total), padding_mask(side, lengths, total)
    plan = random_plan(model, 3, total)
    logits, posterior = model(tokens, attention_mask=mask, plan=plan).logits, model.infer_plan(tokens, mask)
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        real, plans = mask[row].bool(), num_plans(span, length)
        alone = tokens[row, real][None]
        expected = model(alone, plan=plan[row, :plans]).logits
        assert_close(logits[row, real], expected[0], **CLOSE)
        assert_close(posterior[row, :plans], model.infer_plan(alone)[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("span", SPANS)
def test_padding_changes_neither_loss_nor_gradients(tiny_model, tokens_like, span, side):
    model = certain(tiny_model(plan_span=span, free_bits=0.0)).train()
    tokens, mask = tokens_like(1, 10), padding_mask(side, [6], 10)
    results = []
    for row, row_mask in ((tokens, mask), (tokens[:, mask[0].bool()], None)):
        labels = row.clone() if row_mask is None else row.masked_fill(row_mask == 0, -100)
        labels[:, labels[0].ne(-100).int().argmax()] = -100  # the first token has no past, padded or not
        model.zero_grad()
        out = model(row, attention_mask=row_mask, labels=labels, mode="training")
        out.loss.backward()
        results.append((out.loss.detach(), out.reconstruction.detach(), out.kl.detach(), gradients(model)))
    assert_close(*results, **CLOSE)


def packed_row(documents: list[int], total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`position_ids` and `attention_mask` of documents of these lengths one after the other, then padding."""
    positions = [position for length in documents for position in range(length)]
    real = len(positions)
    return torch.tensor(positions + [0] * (total - real)), torch.tensor([1] * real + [0] * (total - real))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("total", [14, 17])
@pytest.mark.parametrize("span", SPANS)
def test_neighbouring_documents_of_a_packed_row_change_nothing(tiny_model, tokens_like, span, total, attention):
    model = tiny_model(DTYPES[attention], plan_span=span)
    model.set_attn_implementation(attention)
    rows = [[5, 1, 8], [14], [1, 1, 3]]
    tokens = tokens_like(len(rows), total)
    positions, mask = (torch.stack(parts) for parts in zip(*(packed_row(row, total) for row in rows), strict=True))
    posterior = model.encode(model.lower_layers(tokens, mask, positions))
    assert_close(model.infer_plan(tokens, mask, positions), posterior.detach())
    plan = model.sample_plan(*posterior.shape[:2])
    logits = model(tokens, attention_mask=mask, position_ids=positions, plan=plan).logits
    for row, documents in enumerate(rows):
        token, first_plan = 0, 0
        for length in documents:
            plans = slice(first_plan, first_plan + num_plans(span, length))
            alone = tokens[row : row + 1, token : token + length]
            expected = model(alone, plan=plan[row, plans]).logits
            assert_close(logits[row, token : token + length], expected[0], **CLOSE)
            assert_close(posterior[row, plans], model.infer_plan(alone)[0], **CLOSE)
            token, first_plan = token + length, plans.stop


def test_packed_rows_of_a_plain_llama_agree(tiny_model, tokens_like):
    model = tiny_model(torch.float32, table_init="zero")
    tokens, positions = tokens_like(1, 14), packed_row([5, 1, 8], 14)[0][None]
    expected = llama_of(model)(tokens, position_ids=positions, use_cache=False).logits
    assert_close(model(tokens, position_ids=positions).logits, expected, **CLOSE)


@pytest.mark.parametrize("span", SPANS)
def test_plan_mask_marks_the_plans_that_cover_text(tiny_model, tokens_like, span):
    model, mask = tiny_model(plan_span=span), padding_mask("left", [9, 4], 9)
    out = model(tokens_like(2, 9), attention_mask=mask)
    assert out.plan_mask.sum(1).tolist() == [num_plans(span, 9), num_plans(span, 4)]
    assert out.plan_mask[1, : num_plans(span, 4)].all()


@pytest.mark.parametrize("span", SPANS)
def test_nothing_leaks_from_the_future_under_a_fixed_plan(tiny_model, tokens_like, span):
    model, length = tiny_model(plan_span=span, injection_layers=[2, 3]), 9
    tokens, plan = tokens_like(1, length), random_plan(model, 1, length)
    logits = model(tokens, plan=plan).logits
    for t in range(length - 1):
        later, later_plan = tokens.clone(), plan.clone()
        later[:, t + 1 :] = tokens_like(1, length - t - 1)
        first_later = length if span == "sequence" else t // span + 1
        later_plan[:, first_later:] = ~plan[:, first_later:]
        changed = model(later, plan=later_plan).logits
        assert_close(changed[:, : t + 1], logits[:, : t + 1], atol=1e-9, rtol=0)
        assert (changed[:, t + 1 :] - logits[:, t + 1 :]).abs().max() > 1e-4


@pytest.mark.parametrize("span", SPANS)
def test_a_plan_reaches_the_tokens_that_it_covers(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(1, 9)
    plan = random_plan(model, 1, 9)
    logits = model(tokens, plan=plan).logits
    for index in range(plan.shape[1]):
        other = plan.clone()
        other[:, index] = ~plan[:, index]
        changed = (model(tokens, plan=other).logits - logits)[0].abs().amax(-1) > 1e-5
        start = 0 if span == "sequence" else index * span
        assert changed.tolist() == [t >= start for t in range(9)]


@pytest.mark.parametrize("free_bits", [0.0, 100.0])
@pytest.mark.parametrize(("span", "gradient"), [(1, "exact"), (4, "sampled"), ("sequence", "exact")])
def test_every_parameter_receives_a_gradient(tiny_model, tokens_like, span, gradient, free_bits):
    model = tiny_model(plan_span=span, plan_gradient=gradient, free_bits=free_bits, num_kv_heads=2).train()
    tokens = tokens_like(4, 9)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("changes", [{}, {"code_bits": 2}, {"injection_layers": [2, 3]}])
@pytest.mark.parametrize("span", SPANS)
def test_gradient_at_the_plan_logits_is_the_expectation_over_all_plans(tiny_model, tokens_like, span, changes):
    model, tokens = tiny_model(plan_span=span, kl_weight=0.0, **changes), tokens_like(2, 6)
    kept = []
    model.plan_table.register_forward_hook(lambda _module, _inputs, states: kept.append(states))
    out = model(tokens, labels=tokens)
    grad, actual = torch.autograd.grad(out.loss, [kept[0], out.plan_logits])
    logits = out.plan_logits.detach().requires_grad_()
    plans = codes_to_bits(torch.arange(16), 4)
    p = logits.sigmoid()[..., None, :]
    q = torch.where(plans, p, 1 - p).prod(-1)  # (B, P, 16)
    expected = torch.autograd.grad((q * (grad @ model.plan_table(plans[None])[0].detach().T)).sum(), logits)[0]
    assert_close(actual, expected)
    assert actual.abs().max() > 1e-6


def test_losses_of_the_model_are_the_objective_of_its_output(tiny_model, tokens_like):
    model, tokens = tiny_model(free_bits=0.25, kl_weight=0.5), tokens_like(2, 6)
    labels = tokens.clone()
    labels[0, :3] = -100
    out = model(tokens, labels=labels)
    predicted = 3 + 5
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    p = out.plan_logits.sigmoid()
    kl = (p * p.log2() + (1 - p) * (1 - p).log2() + 1).sum(-1)
    hinge = (kl - 0.25).clamp(min=0).sum() * torch.tensor(2.0).log() / predicted
    assert_close(out.reconstruction, expected)
    assert_close(out.kl, kl.mean())
    assert_close(out.loss, expected + 0.5 * hinge, **CLOSE)


@pytest.mark.parametrize("span", SPANS)
def test_micro_batches_sum_to_the_gradient_of_the_whole_batch(tiny_model, tokens_like, span):
    model = certain(tiny_model(plan_span=span, free_bits=0.1)).train()
    tokens = tokens_like(8, 9)
    labels = tokens.clone()
    labels[0, 2:] = -100
    labels[5, :4] = -100
    model(tokens, labels=labels).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for part, part_labels in zip(tokens.split(2), labels.split(2), strict=True):
        model(part, labels=part_labels, num_items_in_batch=count).loss.backward()
    assert_close(gradients(model), whole, **CLOSE)
    assert whole["encoder.readout.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"injection_layers": [2, 3]}])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, tokens_like, changes, use_reentrant):
    model, tokens = certain(tiny_model(**changes)).train(), tokens_like(2, 6)
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    model(tokens, labels=tokens).loss.backward()
    assert_close(gradients(model), expected, **CLOSE)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("span", SPANS)
def test_eager_attention_equals_sdpa(tiny_model, tokens_like, span, padding):
    model, tokens = certain(tiny_model(torch.float32, plan_span=span)), tokens_like(2, 9)
    mask = padding_mask(padding, [9, 5], 9) if padding else torch.ones(2, 9, dtype=torch.long)
    outputs = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        assert model.encoder.attention.config._attn_implementation == attention
        out = model(tokens, attention_mask=mask, mode="training")
        outputs.append((out.logits[mask.bool()], out.plan_logits[out.plan_mask]))
    assert_close(*outputs, **CLOSE)


def flash_reference(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **_):
    """Flash Attention as `transformers` calls it: (B, T) of padding or boundaries of documents, and no other mask."""
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    allowed = torch.ones(batch, queries, keys, dtype=torch.bool)
    if cu_seq_lens_q is not None:
        places = torch.arange(batch * keys).view(batch, keys)
        document = torch.bucketize(places, cu_seq_lens_q.long(), right=True)
        allowed &= document[:, :, None] == document[:, None]
    elif attention_mask is not None:
        assert attention_mask.ndim == 2
        assert queries == keys, "the padding of queries would be taken from that of keys"
        allowed &= attention_mask.bool()[:, None]
    if module.is_causal:
        allowed &= torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    allowed[..., 0] |= ~allowed.any(-1)  # of padding, whose results are not read
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, allowed[:, None], scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


@pytest.mark.parametrize("rows", ["whole", "left", "right", "packed", "packed and padded"])
@pytest.mark.parametrize("span", SPANS)
def test_flash_attention_is_told_of_padding_and_documents(tiny_model, tokens_like, span, rows, monkeypatch):
    model, tokens = certain(tiny_model(torch.float32, plan_span=span)), tokens_like(2, 9)
    mask, positions = torch.ones(2, 9, dtype=torch.long), None
    if rows in ("left", "right"):
        mask = padding_mask(rows, [9, 5], 9)
    elif rows != "whole":
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    if rows == "packed and padded":
        mask[1, 6:] = 0
        positions[1, 6:] = 0
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_reference)
    outputs = []
    for attention in ("sdpa", "flash_attention_2"):
        model.config._attn_implementation_internal = attention
        out = model(tokens, attention_mask=mask, position_ids=positions, mode="training")
        outputs.append((out.logits[mask.bool()], out.plan_logits[out.plan_mask]))
    assert_close(*outputs, **CLOSE)


GPU_ATTENTION = ["flex_attention", "flash_attention_2", "flash_attention_3"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of a GPU")
@pytest.mark.parametrize("attention", GPU_ATTENTION)
@pytest.mark.parametrize("rows", ["whole", "left", "packed"])
@pytest.mark.parametrize("span", SPANS)
def test_attention_of_a_gpu_equals_sdpa(tiny_model, tokens_like, span, rows, attention):
    width = {"hidden_dim": 128, "num_heads": 2, "num_kv_heads": 2}
    model = certain(tiny_model(torch.bfloat16, plan_span=span, **width)).cuda()
    tokens, mask = tokens_like(2, 48).cuda(), torch.ones(2, 48, dtype=torch.long, device="cuda")
    positions = (torch.arange(48, device="cuda") % 16).expand(2, -1) if rows == "packed" else None
    if rows == "left":
        mask[0, :20] = 0
    outputs = []
    for each in ("sdpa", attention):
        try:
            model.set_attn_implementation(each)
        except ImportError as missing:
            pytest.skip(str(missing))
        out = model(tokens, attention_mask=mask, position_ids=positions, mode="training")
        outputs.append((out.logits[mask.bool()], out.plan_logits[out.plan_mask]))
    assert_close(*outputs, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("padding", [None, "left"])
def test_half_precision_forward_and_backward_are_finite(tiny_model, tokens_like, padding):
    model, tokens = tiny_model(torch.bfloat16).train(), tokens_like(2, 8)
    mask = padding_mask(padding, [8, 5], 8) if padding else None
    out = model(tokens, attention_mask=mask, labels=tokens)
    out.loss.backward()
    assert out.logits.dtype == out.plan_logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_mode_follows_the_arguments_and_not_the_state_of_the_module(tiny_model, tokens_like):
    model, tokens = tiny_model(), tokens_like(2, 5)
    for training in (True, False):
        model.train(training)
        assert model(tokens, labels=tokens).plan_logits.shape == (2, 5, 4)
        assert model(tokens).plan_logits is None
        out = model(tokens, labels=tokens, mode="inference")
        assert out.plan_logits is None
        assert out.kl is None
        assert out.loss == out.reconstruction
        unlabelled = model(tokens, mode="training")
        assert unlabelled.loss is None
        assert unlabelled.plan_logits.shape == (2, 5, 4)


def test_inference_does_not_run_the_encoder(tiny_model, tokens_like, monkeypatch):
    model, tokens = tiny_model(), tokens_like(2, 5)

    def refuse(*_args, **_kwargs):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(model.encoder, "forward", refuse)
    model(tokens)
    model(tokens, plan=random_plan(model, 2, 5), labels=tokens)
    with pytest.raises(AssertionError, match="the encoder ran"):
        model(tokens, mode="training")


@pytest.mark.parametrize("span", SPANS)
def test_number_of_plans_follows_the_span(tiny_model, tokens_like, span):
    model, plans = tiny_model(plan_span=span), {1: 10, 4: 3, "sequence": 1}[span]
    for mode in ("training", "inference"):
        out = model(tokens_like(2, 10), mode=mode)
        assert out.plan.shape == (2, plans, 4)
        assert out.plan.dtype == torch.bool
    assert model.infer_plan(tokens_like(2, 10)).shape == (2, plans, 4)


def test_plans_follow_the_posterior_in_training_and_the_uniform_prior_in_inference(tiny_model, tokens_like):
    model, tokens = tiny_model(torch.float32, plan_span="sequence"), tokens_like(1, 5)
    p = model.infer_plan(tokens).sigmoid()[0, 0].double()
    assert (p - 0.5).abs().max() > 0.1
    draws = 2000
    for mode, expected in (("training", p), ("inference", torch.full_like(p, 0.5))):
        frequency = model(tokens.expand(draws, -1), mode=mode).plan[:, 0].double().mean(0)
        assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_sampled_plans_are_uniform_and_repeat_under_a_generator(tiny_model):
    model = tiny_model()
    first, second = (model.sample_plan(500, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (500, 3, 4)
    assert first.dtype == torch.bool
    assert torch.equal(first, second)
    assert abs(first.double().mean() - 0.5) < 5 * 0.5 / first.numel() ** 0.5


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_one_plan_for_all_rows_equals_the_same_plan_for_each(tiny_model, tokens_like, kind):
    model, tokens = tiny_model(plan_span=4), tokens_like(3, 9)
    plan = random_plan(model, 1, 9)
    expected = model(tokens, plan=plan.expand(3, -1, -1))
    out = model(tokens, plan=plan[0].to(kind))
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.plan, plan.expand(3, -1, -1))


@pytest.mark.parametrize(
    "shape", [(4,), (2, 4), (4, 4), (3, 5), (1, 3, 4), (2, 3, 5), (2, 2, 4), (2, 0, 4), (1, 2, 3, 4)]
)
def test_plan_of_another_shape_is_refused(tiny_model, tokens_like, shape):
    with pytest.raises(ValueError, match=r"plan of shape .*expected"):
        tiny_model(plan_span=4)(tokens_like(2, 9), plan=torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan")])
def test_plan_of_other_values_than_bits_is_refused(tiny_model, tokens_like, value):
    with pytest.raises(ValueError, match="values other than bits"):
        tiny_model(plan_span=4)(tokens_like(2, 9), plan=torch.full((3, 4), value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "train"}, "mode='train': one of"),
        ({"mode": "training", "plan": torch.zeros(5, 4)}, "pass a plan with mode='inference'"),
        ({"prompt_plan": "encoder"}, "prompt_plan='encoder': one of"),
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, "either input_ids or inputs_embeds"),
    ],
)
def test_contradictory_arguments_are_refused(tiny_model, tokens_like, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens_like(2, 5), **arguments)


def test_embeddings_may_be_given_in_the_place_of_tokens(tiny_model, tokens_like):
    model, tokens = tiny_model(), tokens_like(2, 5)
    plan = random_plan(model, 2, 5)
    logits = model(inputs_embeds=model.get_input_embeddings()(tokens), plan=plan).logits
    assert torch.equal(logits, model(tokens, plan=plan).logits)


@pytest.mark.parametrize("span", [1, 4])
def test_positions_that_start_late_do_not_change_how_a_plan_covers_tokens(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(1, 7)
    out = model(tokens, position_ids=torch.arange(2, 9)[None], mode="training")
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("span", SPANS)
def test_plan_strength_scales_the_plan_vectors(tiny_model, tokens_like, span):
    """As if the codebook were larger; 0 is the plain Llama. The configuration can change at any time."""
    model = tiny_model(plan_span=span).double()
    tokens = tokens_like(2, 9)
    plan = random_plan(model, 2, 9)
    larger = deepcopy(model)
    with torch.no_grad():
        larger.plan_table.weight *= 2.5
    model.config.plan_strength = 2.5
    assert_close(model(tokens, plan=plan).logits, larger(tokens, plan=plan).logits, **CLOSE)
    cached, steps = model(tokens[:, :4], plan=plan, prompt_plan="prior", use_cache=True), []
    for column in range(4, 9):
        cached = model(tokens[:, column : column + 1], plan=plan[:, : num_plans(span, column + 1)], cache=cached.cache)
        steps.append(cached.logits)
    assert_close(torch.cat(steps, 1), larger(tokens, plan=plan).logits[:, 4:], **CLOSE)
    model.config.plan_strength = 0
    assert_close(model(tokens, plan=plan).logits, llama_of(model)(tokens).logits, **CLOSE)


def test_plan_strength_is_saved_and_checked(tiny_model, tiny_config, tmp_path):
    model = tiny_model()
    model.config.plan_strength = 1.5
    model.save_pretrained(tmp_path)
    assert FreeTransformer.from_pretrained(tmp_path).config.plan_strength == 1.5
    assert FreeTransformer.from_pretrained(tmp_path, plan_strength=3).config.plan_strength == 3
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="plan_strength"):
            tiny_config(plan_strength=bad)
