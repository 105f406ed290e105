"""Sliding-window attention: the logits of a Mistral with the same window, and an encoder that reads everything."""

import copy
import itertools
import json
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache, MistralForCausalLM, StaticCache

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.evaluation.particle_filter import _UpperLayers
from free_transformer.model import sliding_window
from free_transformer.model.cache import PlanCache, WindowLayer
from free_transformer.model.compat import ALL_ATTENTION_FUNCTIONS
from free_transformer.model.initialization import build_baseline
from free_transformer.model.layout import batch_layout
from free_transformer.model.sliding_window import window_blocks

WINDOWS = [1, 2, 5, 33]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # of norms and rotary positions, which Llama and Mistral compute in fp32
LONG = 150  # tokens: with each window, enough for attention in blocks


@pytest.fixture
def pair(tiny_model):
    """A Free Transformer whose plan changes nothing, and a Mistral with the same weights."""

    def build(window: int, dtype: torch.dtype = torch.float64, **changes) -> tuple[FreeTransformer, MistralForCausalLM]:
        model = tiny_model(dtype, sliding_window=window, table_init="zero", **changes)
        mistral = MistralForCausalLM(model.config.to_llama()).to(dtype).eval()
        mistral.load_state_dict({n: t for n, t in model.state_dict().items() if n in mistral.state_dict()})
        mistral.set_attn_implementation(model.config._attn_implementation)
        return model, mistral

    return build


def dense_mask(window: int, tokens: int, groups: Tensor | None = None) -> Tensor:
    """(1 or B, 1, T, T) bool, written out: distance from 0 to window - 1, within a group of (B, T) numbers."""
    rank = torch.arange(tokens)
    distance = rank[:, None] - rank
    seen = ((distance >= 0) & (distance < window))[None]
    return (seen if groups is None else seen & (groups[:, :, None] == groups[:, None]))[:, None]


def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A mask with padding on the left, on the right and in holes, and positions that count real tokens."""
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    mask[1, -5:] = 0
    mask[1, 20:23] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_are_those_of_a_mistral(pair, tokens_like, window, attention):
    dtype = torch.float64 if attention == "sdpa" else torch.float32  # a Mistral's eager attention computes in fp32
    model, mistral = pair(window, dtype, attn_implementation=attention)
    for length in (4, 40, LONG):
        tokens = tokens_like(2, length)
        expected = mistral(tokens, use_cache=False).logits
        for options in ({"mode": "training"}, {"use_cache": False}, {"use_cache": True}):
            assert_close(model(tokens, **options).logits, expected, **CLOSE)
        assert_close(model(tokens, logits_to_keep=1).logits, expected[:, -1:], **CLOSE)
    mask, positions = padded(tokens)
    expected = mistral(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    for options in ({"attention_mask": mask}, {"layout": batch_layout(1, tokens.shape, mask, None)}):
        assert_close(model(tokens, **options, mode="training").logits[mask.bool()], expected, **CLOSE)
    last = model(tokens, attention_mask=mask, logits_to_keep=1).logits
    assert_close(last[0, -1], model(tokens, attention_mask=mask).logits[0, -1], **CLOSE)


def test_a_window_as_long_as_the_text_is_full_attention(tiny_model, tokens_like):
    tokens = tokens_like(2, 20)
    full, slides = (tiny_model(sliding_window=window) for window in (None, 20))
    slides.load_state_dict(full.state_dict())
    plan = full.sample_plan(2, 20)
    assert_close(slides(tokens, plan=plan).logits, full(tokens, plan=plan).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [2, 40])
def test_blocks_are_the_whole_mask_and_so_are_their_gradients(window):
    torch.manual_seed(window)
    tokens = 4 * max(window, sliding_window.MIN_BLOCK) + 3
    groups = torch.randint(0, 3, (2, tokens)).sort(1).values
    groups[1, -30:] = -1
    for own in (None, groups):
        blocks = window_blocks(window, tokens, torch.device("cpu"), own)
        assert blocks.equal == (own is None)
        pairs = blocks.first[0].numel() + tokens // blocks.size * blocks.others[0].numel()
        assert pairs < (tokens + blocks.size) * (blocks.size + window) < 0.75 * tokens**2
        states = [torch.randn(2, 2, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

        def attend(query, key, value, mask):
            found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return found.transpose(1, 2), None

        found = sliding_window.attend_in_blocks(attend, blocks, *states)
        expected, _ = attend(*states, dense_mask(window, tokens, own))
        assert_close(found, expected, atol=1e-13, rtol=0)
        weights = torch.randn_like(expected)
        slopes = [torch.autograd.grad((output * weights).sum(), states) for output in (found, expected)]
        assert_close(*slopes, atol=1e-12, rtol=0)
    assert window_blocks(window, 4 * max(window, sliding_window.MIN_BLOCK) - 1, torch.device("cpu"), None) is None


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_step_are_those_of_a_mask_of_one_s_own(tiny_model, tokens_like, rows, checkpointing):
    model, tokens = tiny_model(sliding_window=6, plan_span="sequence").train(), tokens_like(2, LONG)
    options, groups, labels = {}, None, tokens
    if rows == "padded":
        options["attention_mask"], _ = padded(tokens)
        groups = options["attention_mask"]
        labels = tokens.masked_fill(groups == 0, -100)
    elif rows == "packed":
        options["position_ids"] = torch.stack([torch.arange(LONG) % 50, torch.arange(LONG) % 70])
        groups = torch.stack([torch.arange(LONG) // 50, torch.arange(LONG) // 70])
    if checkpointing:
        model.gradient_checkpointing_enable()
    plan = model.sample_plan(2, 3 if rows == "packed" else 1)
    model(tokens, labels=labels, plan=plan, **options).loss.backward()
    found = gradients(model)
    model.gradient_checkpointing_disable()
    layout = model.lower_layers(tokens, **options).layout
    inputs = (model.model.embed_tokens(tokens), dense_mask(6, LONG, groups), layout.position_ids, None, layout)
    logits = model.upper_layers(model.model.run_lower(*inputs), plan)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    assert_close(found, gradients(model), atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_rows_are_separate_documents(tiny_model, tokens_like, attention):
    model = tiny_model(sliding_window=6, plan_span="sequence", attn_implementation=attention)
    tokens, plan = tokens_like(1, LONG), model.sample_plan(1, 3)
    positions = torch.cat([torch.arange(length) for length in (70, 3, 77)])[None]
    whole = model(tokens, position_ids=positions, plan=plan).logits
    read = model.infer_plan(tokens, position_ids=positions)
    for number, own in enumerate(tokens.split([70, 3, 77], 1)):
        start = [0, 70, 73][number]
        alone = model(own, plan=plan[:, number : number + 1]).logits
        assert_close(whole[:, start : start + own.shape[1]], alone, **CLOSE)
        assert_close(read[:, number], model.infer_plan(own)[:, 0], **CLOSE)


@pytest.mark.parametrize("span", [16, "sequence"])
def test_the_encoder_reads_the_whole_text(tiny_model, tokens_like, span):
    """X of each token changes only within reach of the window, but the posterior of every plan depends on all of X."""
    model, tokens = tiny_model(sliding_window=4, plan_span=span), tokens_like(1, LONG)
    lower = model.lower_layers(tokens)
    states = lower.hidden_states.detach().requires_grad_()
    lower.hidden_states = states
    (slope,) = torch.autograd.grad(model.encode(lower).square().sum(), states)
    assert (slope.abs().amax(-1) > 0).all()
    full = tiny_model(plan_span=span)
    full.load_state_dict(model.state_dict())
    assert_close(full.encode(lower), model.encode(lower), atol=0, rtol=0)
    embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
    reach = model.lower_layers(inputs_embeds=embedded).hidden_states[0, 100].sum()
    (slope,) = torch.autograd.grad(reach, embedded)
    read = slope[0].abs().amax(-1).nonzero().flatten().tolist()
    assert read == list(range(100 - 2 * 3, 101))  # two lower layers


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_token_by_token_far_beyond_the_window(pair, tokens_like, window):
    model, mistral = pair(window)
    tokens = tokens_like(2, LONG)
    expected = mistral(tokens, use_cache=False).logits
    plan = model.sample_plan(2, LONG)
    for cache in (PlanCache(model.config), PlanCache(model.config, LONG), DynamicCache()):
        pieces, sizes = [], set()
        start = 0
        for length in (9, *[1] * 60, 3, 8, *[1] * (LONG - 80)):
            part = tokens[:, start : start + length]
            pieces.append(model(part, plan=plan, prompt_plan="prior", cache=cache).logits)
            start += length
            assert cache.get_seq_length() == start
            sizes.add(cache.layers[0].keys.untyped_storage().nbytes())
        assert start == LONG
        assert_close(torch.cat(pieces, 1), expected, **CLOSE)
        if isinstance(cache, PlanCache):
            assert all(layer.keys.shape[2] == window - 1 for layer in cache.layers)
            row = model.config.head_dim * 8
            assert max(sizes) <= 2 * (2 * window + 8) * row  # of two texts, with the longest piece read at once


@torch.no_grad()
def test_a_cache_keeps_no_long_prompt(tiny_model, tokens_like):
    cache = tiny_model(sliding_window=5)(tokens_like(1, LONG)).cache
    assert isinstance(cache.layers[0], WindowLayer)
    assert {each.untyped_storage().nbytes() for each in (cache.layers[0].keys, cache.layers[0].values)} == {4 * 8 * 8}


@torch.no_grad()
def test_appending_copies_a_bounded_number_of_tokens(monkeypatch):
    layer, copied = WindowLayer(64), []
    make = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size: copied.append(size[2]) or make(self, *size))
    for _ in range(1000):
        layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert sum(copied) / 2 <= 2.5 * 1000
    assert max(copied) <= 2 * 64


@pytest.mark.parametrize("span", [3, "sequence"])
@torch.no_grad()
def test_generation_with_and_without_a_cache_and_padding(tiny_model, tokens_like, span):
    model = tiny_model(sliding_window=5, plan_span=span, latent_dim=8)
    tokens, mask = tokens_like(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :7] = 0
    plan = model.sample_plan(2, 40 if span == 3 else 1)
    options = {"plan": plan, "max_new_tokens": 60, "do_sample": False}
    cached = model.generate(tokens, attention_mask=mask, **options)
    for kind in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(tokens, attention_mask=mask, **options, **kind), cached)
    for row in range(2):
        real = tokens[row][mask[row].bool()][None]
        alone = model.generate(real, **{**options, "plan": plan[row]})
        assert torch.equal(alone[0, -60:], cached[row, -60:])
        logits = model(alone, plan=plan[row : row + 1, : 1 if span != 3 else -(-alone.shape[1] // 3)]).logits
        assert torch.equal(logits[0, real.shape[1] - 1 : -1].argmax(-1), alone[0, -60:])


@torch.no_grad()
def test_a_returned_cache_is_continued_and_its_rows_move(tiny_model, tokens_like):
    model, tokens = tiny_model(sliding_window=5, plan_span=3, latent_dim=8), tokens_like(3, 6)
    options = {"do_sample": False, "return_dict_in_generate": True}
    begun = model.generate(tokens, max_new_tokens=20, **options)
    mask = torch.ones_like(begun.sequences)
    more = model.generate(
        begun.sequences, max_new_tokens=9, past_key_values=copy.deepcopy(begun.cache), attention_mask=mask, **options
    )
    assert torch.equal(model.generate(tokens, plan=more.plan, do_sample=False, max_new_tokens=29), more.sequences)
    rows = torch.tensor([2, 0])
    for change in (PlanCache.reorder_cache, PlanCache.batch_select_indices):
        cache = copy.deepcopy(begun.cache)
        change(cache, rows)
        for token in begun.sequences[rows, -1:].split(1, 1):
            found = model(token, cache=cache).logits
        whole = model(begun.sequences[rows], plan=begun.plan[rows]).logits[:, -1:]
        assert_close(found, whole, **CLOSE)
    cache = copy.deepcopy(begun.cache)
    cache.batch_repeat_interleave(2)
    found = model(begun.sequences[:, -1:].repeat_interleave(2, 0), cache=cache).logits
    whole = model(begun.sequences, plan=begun.plan).logits[:, -1:]
    assert_close(found, whole.repeat_interleave(2, 0), **CLOSE)
    cache.reset()
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_static_caches_and_custom_masks(pair, tiny_model, tokens_like):
    model, mistral = pair(5)
    tokens, plan = tokens_like(2, 30), model.sample_plan(2, 30)
    expected = mistral(tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=40)
    pieces = [model(tokens[:, :8], plan=plan, prompt_plan="prior", cache=cache).logits]
    for place in range(8, 30):
        pieces.append(model(tokens[:, place : place + 1], plan=plan, prompt_plan="prior", cache=cache).logits)
    assert_close(torch.cat(pieces, 1), expected, **CLOSE)

    causal = torch.ones(30, 30, dtype=torch.bool).tril()[None, None]
    full = tiny_model()
    full.load_state_dict(model.state_dict())
    assert_close(model(tokens, attention_mask=causal, plan=plan).logits, full(tokens, plan=plan).logits, **CLOSE)
    narrow = dense_mask(3, 30)
    whole = model(tokens, attention_mask=narrow, plan=plan).logits
    cache = model(tokens[:, :20], attention_mask=narrow[..., :20, :20], plan=plan, prompt_plan="prior").cache
    after = model(tokens[:, 20:], attention_mask=narrow[:, :, 20:], cache=cache).logits
    assert_close(after, whole[:, 20:], **CLOSE)


def windowed_flash(module, query, key, value, attention_mask, scaling, sliding_window=None, cu_seq_lens_q=None, **_):
    """Flash Attention as `transformers` calls it, with a window and boundaries of documents."""
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    rank = torch.arange(keys)
    distance = rank[keys - queries :, None] - rank
    allowed = torch.ones(batch, queries, keys, dtype=torch.bool)
    if module.is_causal:
        allowed &= (distance >= 0) & (distance < (sliding_window or keys))
    else:
        assert sliding_window is None
    if cu_seq_lens_q is not None:
        document = torch.bucketize(torch.arange(batch * keys).view(batch, keys), cu_seq_lens_q.long(), right=True)
        allowed &= document[:, :, None] == document[:, None]
    elif attention_mask is not None:
        allowed &= attention_mask.bool()[:, None]
    allowed[..., 0] |= ~allowed.any(-1)  # of padding, whose results are not read
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, allowed[:, None], scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


@pytest.mark.parametrize("rows", ["whole", "left", "packed"])
@torch.no_grad()
def test_flash_attention_is_told_of_the_window(tiny_model, tokens_like, rows, monkeypatch):
    model, tokens = tiny_model(torch.float32, sliding_window=4, plan_span="sequence"), tokens_like(2, 30)
    mask, positions = torch.ones_like(tokens), None
    if rows == "left":
        mask[1, :9] = 0
    elif rows == "packed":
        positions = torch.stack([torch.arange(30) % 12, torch.arange(30) % 20])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", windowed_flash)
    plan = model.sample_plan(2, 3 if rows == "packed" else 1)
    outputs = []
    for attention in ("sdpa", "flash_attention_2"):
        model.config._attn_implementation_internal = attention
        logits = model(tokens, attention_mask=mask, position_ids=positions, plan=plan).logits[mask.bool()]
        outputs.append([logits, model.infer_plan(tokens, mask, positions)])
        if rows != "packed":
            cache = model(tokens[:, :20], attention_mask=mask[:, :20], plan=plan, prompt_plan="prior").cache
            for end in range(21, 31):
                after = model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache).logits
            outputs[-1].append(after)
    assert_close(*outputs, **CLOSE)


@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
@pytest.mark.parametrize("window", [1, 5, 160])
@torch.no_grad()
def test_the_particle_filter_reads_within_the_window(tiny_model, tokens_like, rows, window):
    """Logits of stretches of a text, each token under its own plan, with a cache of the upper layers."""
    model, tokens = tiny_model(sliding_window=window, plan_span=16), tokens_like(2, LONG)
    options = {}
    if rows == "padded":
        options["attention_mask"], _ = padded(tokens)
    elif rows == "packed":
        options["position_ids"] = torch.stack([torch.arange(LONG) % 48, torch.arange(LONG) % 64])
    lower = model.lower_layers(tokens, **options)
    plan = torch.zeros(2, lower.layout.num_plans, 4, dtype=torch.bool)
    plan[:, 3:] = model.sample_plan(1, 1)  # the same in both rows and from some column on
    starts = [0, *((lower.layout.token_plan == 3).int().argmax(1)).sort().values.tolist(), LONG]
    of_token = plan.gather(1, lower.layout.token_plan[..., None].expand(-1, -1, 4))
    expected = model.upper_layers(lower, plan)
    upper = _UpperLayers(model, lower, 2)
    pieces = []
    for start, end in itertools.pairwise(sorted(set(starts))):
        pieces.append(upper.step(of_token[:, start].repeat_interleave(2, 0), start, end))
        upper.reorder(torch.tensor([[1, 0], [0, 0]]))
    real = options.get("attention_mask", torch.ones_like(tokens)).bool().repeat_interleave(2, 0)
    assert_close(torch.cat(pieces, 1)[real], expected.repeat_interleave(2, 0)[real], **CLOSE)


@pytest.mark.parametrize("length", [20, LONG])
def test_it_compiles_to_one_graph(tiny_model, tokens_like, length):
    model, tokens = tiny_model(sliding_window=5, plan_span="sequence"), tokens_like(2, length)
    plan, compiled = model.sample_plan(2), torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for padding in (None, mask):
        found = [call(tokens, attention_mask=padding, plan=plan, labels=tokens).loss for call in (model, compiled)]
        assert_close(*found)


@pytest.mark.parametrize("value", [0, -4, True, 2.5, "8"])
def test_windows_that_are_no_number_of_tokens_are_refused(value):
    with pytest.raises(ValueError, match="sliding_window"):
        FreeTransformerConfig(sliding_window=value)


@torch.no_grad()
def test_saving_and_loading(tmp_path, tiny_model, tokens_like):
    model, tokens = tiny_model(sliding_window=5), tokens_like(2, 40)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == 5
    assert (tmp_path / "sliding_window.py").exists()
    plan = model.sample_plan(2, 40)
    expected = model(tokens, plan=plan).logits
    assert_close(FreeTransformer.from_pretrained(tmp_path)(tokens, plan=plan).logits, expected, atol=1e-6, rtol=1e-6)
    assert FreeTransformer.from_pretrained(tmp_path, sliding_window=None).config.sliding_window is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_key_norm": True},
        {"attention_bias": True, "attention_output_bias": False},
    ],
)
@torch.no_grad()
def test_a_baseline_has_the_window_and_the_same_initialization(tiny_config, tokens_like, changes):
    config = tiny_config(sliding_window=5, hidden_dim=64, num_heads=4, table_init="zero", **changes)
    baseline, model = build_baseline(config).eval(), FreeTransformer(config).eval()
    for name, parameter in baseline.named_parameters():
        ours = model.get_parameter(name)
        assert_close(parameter.std(), ours.std(), atol=0.02, rtol=0.2)  # both random
    model.load_state_dict(baseline.state_dict(), strict=False)
    tokens = tokens_like(2, 40)
    assert_close(model(tokens).logits, baseline(tokens).logits, **CLOSE)


def test_biases_of_a_llama_have_no_baseline_with_a_window(tiny_config):
    with pytest.raises(ValueError, match="sliding_window=5 with attention_bias or mlp_bias"):
        build_baseline(tiny_config(sliding_window=5, attention_bias=True))


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"sliding_window": 8}, False),
        ({"sliding_window": 16}, False),
        ({"sliding_window": 17}, True),
        ({}, False),  # such a text is read again
        ({"sliding_window": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, True),
    ],
)
def test_a_window_within_the_trained_length_may_generate_beyond_it(tiny_model, tokens_like, changes, warns):
    model = tiny_model(max_seq_len=16, plan_span="sequence", **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(tokens_like(1, 4), max_new_tokens=20, do_sample=False)
    assert any("the model was built for 16" in str(each.message) for each in caught) == warns
