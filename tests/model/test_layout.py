"""Which plan covers which token: the layout and the model against a reference that takes one row at a time."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.model.cache import PlanCache
from free_transformer.model.layout import is_packed, num_plans, plan_layout, token_ranks

SPANS = [1, 2, 3, "sequence"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # of rotary positions, which are computed in fp32


@dataclass
class Token:
    """The reference's result for a real token."""

    document: int
    plan: int
    starts_plan: bool


def reference_row(span: int | str, positions: list[int], real: list[bool]) -> list[Token | None]:
    """Walks a row from the left. None stands for padding."""
    found: list[Token | None] = []
    document, plan, in_document, before = -1, -1, 0, None
    for position, is_real in zip(positions, real, strict=True):
        if not is_real:
            found.append(None)
            continue
        if before is None or position != before + 1:
            document, in_document = document + 1, 0
        starts = in_document == 0 if span == "sequence" else in_document % span == 0
        plan += starts
        found.append(Token(document, plan, starts))
        in_document, before = in_document + 1, position
    return found


@st.composite
def rows(draw, packed: bool):
    """(B, T) positions and mask; positions of padding are arbitrary."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    mask = torch.tensor([draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)) for _ in range(batch)])
    mask[:, draw(st.integers(0, tokens - 1))] = True  # no row is empty
    positions = torch.full((batch, tokens), draw(st.integers(0, 3)))
    for row in range(batch):
        position = draw(st.integers(0, 5))
        for column in range(tokens):
            if mask[row, column]:
                if packed and draw(st.integers(0, 3)) == 0:
                    position = draw(st.integers(0, 5))
                positions[row, column] = position
                position += 1
    return positions, mask


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("packed", [False, True])
def test_layout_is_that_of_the_reference(span, packed):
    @given(rows(packed))
    @settings(max_examples=150)
    def check(positions_and_mask):
        positions, mask = positions_and_mask
        expected = [reference_row(span, *row) for row in zip(positions.tolist(), mask.tolist(), strict=True)]
        documents = max(token.document for row in expected for token in row if token)
        assert is_packed(positions, mask) == (documents > 0)
        layout = plan_layout(span, positions, mask, packed=documents > 0)
        assert layout.num_plans >= 1 + max(token.plan for row in expected for token in row if token)
        for row, tokens in enumerate(expected):
            plans = 0
            for column, token in enumerate(tokens):
                if token is None:
                    continue
                assert layout.token_plan[row, column] == token.plan
                if layout.token_document is not None:
                    assert layout.token_document[row, column] == token.document
                    assert layout.plan_document[row, token.plan] == token.document
                if token.starts_plan:
                    plans += 1
                    assert layout.plan_position[row, token.plan] == positions[row, column]
            assert layout.plan_mask[row].tolist() == [plan < plans for plan in range(layout.num_plans)]

    check()


@given(rows(packed=False), st.data())
def test_ranks_after_a_cache_are_those_of_the_whole_row(positions_and_mask, data):
    _, mask = positions_and_mask
    past = data.draw(st.integers(0, mask.shape[1] - 1))
    whole = token_ranks(mask, 0, mask.shape[1], mask.device)
    assert torch.equal(token_ranks(mask, past, mask.shape[1] - past, mask.device), whole[:, past:])
    everything = torch.ones_like(mask)
    assert torch.equal(
        token_ranks(None, past, mask.shape[1] - past, mask.device), whole.new_tensor([list(range(past, mask.shape[1]))])
    )
    assert torch.equal(
        token_ranks(everything, 0, mask.shape[1], mask.device)[:1], token_ranks(None, 0, mask.shape[1], mask.device)
    )


def small(span: int | str, **changes) -> FreeTransformer:
    torch.manual_seed(0)
    config = {"vocab_size": 32, "hidden_dim": 16, "num_layers": 4, "num_heads": 2, "latent_dim": 4, "max_seq_len": 64}
    config |= {"readout_init_scale": 3.0, "plan_span": span}
    return FreeTransformer(FreeTransformerConfig(**config, **changes)).double().eval()


def row_alone(model: FreeTransformer, tokens: Tensor, mask: Tensor, plan: Tensor) -> Tensor:
    """Logits of a row without its padding, under its own plans: (real tokens, V)."""
    real = tokens[mask][None]
    plans = num_plans(model.config.plan_span, real.shape[1])
    return model(real, plan=plan[None, :plans], use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("span", SPANS)
def test_padding_positions_embeddings_and_caches_change_nothing(span, attention):
    """Padding on either side and in holes, positions from anywhere on, tokens or embeddings, any split by a cache."""
    model = small(span, attn_implementation=attention)

    @given(rows(packed=False), st.data())
    @settings(max_examples=40)
    @torch.no_grad()
    def check(positions_and_mask, data):
        positions, mask = positions_and_mask
        batch, columns = mask.shape
        tokens = torch.randint(3, 32, (batch, columns))
        plan = torch.rand(batch, num_plans(span, columns), 4) < 0.5
        given_positions = positions if data.draw(st.booleans()) else None
        as_embeddings = data.draw(st.booleans())
        cut = data.draw(st.integers(0, columns - 1))

        def read(begin: int, end: int, **options) -> Tensor:
            inputs = {"input_ids": tokens[:, begin:end]}
            if as_embeddings:
                inputs = {"inputs_embeds": model.get_input_embeddings()(tokens[:, begin:end])}
            if given_positions is not None:
                inputs["position_ids"] = given_positions[:, begin:end]
            return model(**inputs, attention_mask=mask[:, :end].long(), **options).logits

        whole = read(0, columns, plan=plan, use_cache=False)
        logits = [whole]
        if cut > 0:
            first = PlanCache(model.config)
            parts = [read(0, cut, plan=plan, prompt_plan="prior", cache=first), read(cut, columns, cache=first)]
            logits.append(torch.cat(parts, 1))  # the cache stores the plan
            foreign = DynamicCache(config=model.config)
            options = {"plan": plan, "prompt_plan": "prior", "past_key_values": foreign}
            logits.append(torch.cat([read(0, cut, **options), read(cut, columns, **options)], 1))
        for row in range(batch):
            expected = row_alone(model, tokens[row], mask[row], plan[row])
            for found in logits:
                assert_close(found[row, mask[row]], expected, **CLOSE)
        posterior = model.infer_plan(tokens, mask.long(), given_positions)
        for row in range(batch):
            alone = model.infer_plan(tokens[row][mask[row]][None])[0]
            assert_close(posterior[row, : len(alone)], alone, **CLOSE)

    check()


@pytest.mark.parametrize("span", SPANS)
def test_generated_text_is_that_of_each_row_alone(span):
    """Greedy text of padded prompts, tokens or embeddings, with every kind of cache."""
    model = small(span)

    @given(rows(packed=False), st.sampled_from(["dynamic", "static", "none"]), st.booleans())
    @settings(max_examples=25)
    @torch.no_grad()
    def check(positions_and_mask, cache, as_embeddings):
        _, mask = positions_and_mask
        mask[:, -1] = True  # the text continues from the last column
        tokens = torch.randint(3, 32, mask.shape)
        plan = torch.rand(len(mask), num_plans(span, mask.shape[1] + 5), 4) < 0.5
        options = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
        kind = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(cache, {})
        prompt = {"inputs": tokens}
        if as_embeddings:
            prompt = {"inputs_embeds": model.get_input_embeddings()(tokens)}
            if cache == "none":
                return  # `transformers` itself continues only from tokens there
        output = model.generate(**prompt, attention_mask=mask.long(), plan=plan, **options, **kind)
        assert torch.equal(output.plan[:, : plan.shape[1]], plan)
        for row in range(len(mask)):
            real = tokens[row][mask[row]]
            alone = model.generate(real[None], plan=plan[row], do_sample=False, max_new_tokens=5)
            assert torch.equal(output.sequences[row, -5:], alone[0, -5:])

    check()


@pytest.mark.parametrize("span", SPANS)
def test_plans_of_a_generated_text_reproduce_it(span):
    model = small(span)
    tokens = torch.randint(3, 32, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
    sampled = {"do_sample": True, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    for kind in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(1)
        output = model.generate(tokens, attention_mask=mask, **sampled, **kind)
        text_mask = torch.cat([mask, mask.new_ones(3, 6)], 1)
        assert output.plan.shape == (3, num_plans(span, 11), 4)
        again = model(output.sequences, attention_mask=text_mask, plan=output.plan).logits[:, 4:-1]
        assert_close(torch.stack(output.logits, 1).double(), again, **CLOSE)


@pytest.mark.parametrize("span", SPANS)
def test_a_packed_row_is_its_documents_alone(span):
    model = small(span)

    @given(rows(packed=True), st.booleans())
    @settings(max_examples=40)
    @torch.no_grad()
    def check(positions_and_mask, use_cache):
        positions, mask = positions_and_mask
        tokens = torch.randint(3, 32, mask.shape)
        half = model.lower_layers(tokens, mask.long(), positions)
        plan = torch.rand(len(mask), half.num_plans, 4) < 0.5
        found = model(tokens, mask.long(), positions, plan=plan, use_cache=use_cache).logits
        for row in range(len(mask)):
            of_row = reference_row(span, positions[row].tolist(), mask[row].tolist())
            for document in {token.document for token in of_row if token}:
                columns = [c for c, token in enumerate(of_row) if token and token.document == document]
                plans = sorted({of_row[c].plan for c in columns})
                alone = model(tokens[row, columns][None], plan=plan[row, plans][None]).logits[0]
                assert_close(found[row, columns], alone, **CLOSE)

    check()


def test_a_packed_row_cannot_be_continued(tokens_like):
    model, tokens = small("sequence"), tokens_like(1, 6)
    cache = model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])).cache
    with pytest.raises(ValueError, match="packed rows of several documents"):
        model(tokens[:, :1], cache=cache)


@pytest.mark.parametrize("span", [2, "sequence"])
def test_a_static_cache_of_the_caller_accepts_any_positions(span, tokens_like):
    model, tokens = small(span), tokens_like(2, 6)
    plan = model.sample_plan(2, num_plans(span, 6))
    expected = model(tokens, plan=plan).logits
    for offset in (0, 3):
        positions = torch.arange(6)[None] + offset
        cache = StaticCache(config=model.config, max_cache_len=8)
        first = model(tokens[:, :5], position_ids=positions[:, :5], plan=plan, prompt_plan="prior", cache=cache)
        second = model(tokens[:, 5:], position_ids=positions[:, 5:], plan=plan, prompt_plan="prior", cache=cache)
        assert_close(torch.cat([first.logits, second.logits], 1), expected, **CLOSE)
