import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig

from free_transformer import FreeTransformer
from free_transformer.model.cache import PlanState
from free_transformer.model.layout import num_plans

SPANS = [1, 4, "sequence"]
BOS, PAD = 1, 0
NEW = 9
SAMPLED = {"do_sample": True, "max_new_tokens": NEW}
GREEDY = {"do_sample": False, "max_new_tokens": NEW}


def seeded(model: FreeTransformer, tokens: torch.Tensor | None, **options):
    torch.manual_seed(3)
    return model.generate(tokens, **options)


class SpiedPlans:
    """The plans of each text that a model generates, of all tokens that it may have."""

    def __init__(self, model: FreeTransformer):
        self.states: list[PlanState] = []
        prepare = model.before_prompt

        def watched(model_kwargs, *arguments):
            prepare(model_kwargs, *arguments)
            self.states.append(model_kwargs["plan"])

        model.before_prompt = watched

    def __getitem__(self, index: int) -> torch.Tensor:
        plan = self.states[index].plan
        assert plan is not None
        return plan


def spied_plans(model: FreeTransformer) -> SpiedPlans:
    return SpiedPlans(model)


def certain(model: FreeTransformer) -> FreeTransformer:
    """Uses the most likely plan instead of a sample: zeros from the prior."""
    model.plan_mapper.forward = lambda plan_logits, generator=None: plan_logits > 0
    bits = model.config.latent_dim
    model.plan_prior.sample = lambda rows, plans, *_, **__: torch.zeros(rows, plans, bits, dtype=torch.bool)
    return model


def with_posterior_of_ones(model: FreeTransformer) -> FreeTransformer:
    """Whatever the encoder reads, each bit of its plan is 1; the prior stays uniform."""
    model.encoder.readout.weight.data.zero_()
    model.encoder.readout.bias.data.fill_(80.0)
    return model


def without_encoder(model: FreeTransformer) -> FreeTransformer:
    def refuse(*_args, **_kwargs):
        raise AssertionError("the encoder ran")

    model.encoder.forward = refuse
    return model


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    tokens, mask = torch.full((2, len(prompts), longest), PAD)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask


@pytest.mark.parametrize("prompt_plan", ["posterior", "prior"])
@pytest.mark.parametrize("span", SPANS)
def test_text_and_plans_are_the_same_with_any_cache(tiny_model, tokens_like, span, prompt_plan):
    model, tokens = tiny_model(plan_span=span), tokens_like(3, 6)
    plans = spied_plans(model)
    results = []
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        text = seeded(model, tokens, prompt_plan=prompt_plan, **SAMPLED, **cache)
        results.append((text, plans[-1]))
    assert results[0][0].shape == (3, 6 + NEW)
    for text, plan in results[1:]:
        assert torch.equal(text, results[0][0])
        assert torch.equal(plan, results[0][1])


@pytest.mark.parametrize("cache", [{"use_cache": True}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("span", SPANS)
def test_left_padded_text_is_the_same_with_any_cache(tiny_model, tokens_like, span, cache):
    model = tiny_model(plan_span=span)
    tokens, mask = left_padded([tokens_like(7), tokens_like(2), tokens_like(4)])
    expected = seeded(model, tokens, attention_mask=mask, use_cache=False, **SAMPLED)
    assert torch.equal(seeded(model, tokens, attention_mask=mask, **SAMPLED, **cache), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_logits_of_each_step_are_those_of_the_whole_text_under_its_plan(tiny_model, tokens_like, span, padded):
    model = tiny_model(plan_span=span)
    tokens, mask = left_padded([tokens_like(6), tokens_like(3 if padded else 6)])
    plans = spied_plans(model)
    out = seeded(
        model, tokens, attention_mask=mask, top_k=0, output_logits=True, return_dict_in_generate=True, **SAMPLED
    )
    text_mask = torch.cat([mask, mask.new_ones(2, NEW)], dim=1)
    assert torch.equal(out.plan, plans[-1])
    whole = model(out.sequences, attention_mask=text_mask, plan=out.plan)
    assert_close(torch.stack(out.logits, 1).double(), whole.logits[:, 5:-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("span", SPANS)
def test_same_seed_generates_the_same_text_and_another_seed_another(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(2, 5)
    first = seeded(model, tokens, **SAMPLED)
    assert torch.equal(seeded(model, tokens, **SAMPLED), first)
    torch.manual_seed(4)
    assert not torch.equal(model.generate(tokens, **SAMPLED), first)


@pytest.mark.parametrize("span", SPANS)
def test_longer_text_starts_with_the_shorter_one(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(2, 5)
    short = seeded(model, tokens, do_sample=True, max_new_tokens=4)
    assert torch.equal(seeded(model, tokens, **SAMPLED)[:, :9], short)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("source", ["given", "posterior", "prior"])
@pytest.mark.parametrize("span", SPANS)
def test_left_padded_batch_generates_as_each_prompt_alone(tiny_model, tokens_like, span, source, use_cache):
    model = certain(tiny_model(plan_span=span))
    prompts = [tokens_like(7), tokens_like(2), tokens_like(5)]
    tokens, mask = left_padded(prompts)
    options = {**GREEDY, "use_cache": use_cache}
    plan = model.sample_plan(3, 1)
    if source == "given":
        plan = torch.rand(3, num_plans(span, 7 + NEW), 4) < 0.5
    else:
        plan, options["prompt_plan"] = None, source
    together = model.generate(tokens, attention_mask=mask, plan=plan, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], plan=None if plan is None else plan[row], **options)
        assert torch.equal(together[row, -len(alone[0]) :], alone[0])


def test_prompt_of_bos_alone_is_empty_in_a_left_padded_batch_too(tiny_model, tokens_like):
    model = with_posterior_of_ones(tiny_model(plan_span="sequence", latent_dim=40))
    tokens, mask = left_padded([tokens_like(5), torch.tensor([BOS])])
    plans = spied_plans(model)
    model.generate(tokens, attention_mask=mask, **GREEDY)
    assert plans[0][0].all()
    assert not plans[0][1].all()


@pytest.mark.parametrize("span", SPANS)
def test_prompt_of_only_bos_samples_its_plan_from_the_prior(tiny_model, span):
    model = with_posterior_of_ones(tiny_model(plan_span=span, latent_dim=8))
    plans = spied_plans(model)
    model.generate(torch.full((64, 1), BOS), max_new_tokens=1, do_sample=True)
    assert plans[0].shape == (64, num_plans(span, 2), 8)
    assert abs(plans[0][:, 0].double().mean() - 0.5) < 5 * 0.5 / plans[0][:, 0].numel() ** 0.5


def test_no_prompt_is_a_prompt_of_bos(tiny_model):
    model = tiny_model(plan_span="sequence")
    plan = model.sample_plan(1, 1)[0]
    text = model.generate(plan=plan, **GREEDY)
    assert torch.equal(text, model.generate(torch.tensor([[BOS]]), plan=plan, **GREEDY))
    assert seeded(model, None, num_return_sequences=3, **SAMPLED).shape == (3, 1 + NEW)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("span", SPANS)
def test_plans_of_tokens_that_were_read_never_change(tiny_model, tokens_like, span, use_cache):
    model = tiny_model(plan_span=span)
    tokens, mask = left_padded([tokens_like(6), tokens_like(3)])
    (whole, steps) = spied_plans(model), []
    watch = lambda _module, _inputs, given, output: steps.append((given, output.plan))  # noqa: E731
    model.register_forward_hook(watch, with_kwargs=True)
    seeded(model, tokens, attention_mask=mask, use_cache=use_cache, **SAMPLED)
    assert len(steps) == NEW
    assert whole[0].shape == (2, num_plans(span, 6 + NEW), 4)
    for step, (given, plan) in enumerate(steps):
        if step == 0:
            assert torch.equal(plan, whole[0][:, : num_plans(span, 6)])
        else:
            assert torch.equal(given["plan"].plan, whole[0])
            assert torch.equal(plan, whole[0][:, : plan.shape[1]])


def test_a_prompt_read_in_chunks_is_refused_since_the_encoder_reads_it_whole(tiny_model, tokens_like):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        seeded(tiny_model(plan_span=1), tokens_like(2, 8), prefill_chunk_size=3, **SAMPLED)


@pytest.mark.parametrize("prompt_plan", ["posterior", "prior"])
def test_plans_of_the_prompt_come_from_where_they_should_and_of_new_text_from_the_prior(
    tiny_model, tokens_like, prompt_plan
):
    model = with_posterior_of_ones(tiny_model(plan_span=4, latent_dim=40))
    plans = spied_plans(model)
    seeded(model, tokens_like(2, 6), prompt_plan=prompt_plan, **SAMPLED)  # plans 0 and 1 cover the prompt
    assert plans[-1].shape == (2, 4, 40)
    assert plans[-1][:, :2].all() == (prompt_plan == "posterior")
    assert not plans[-1].all(-1)[:, 2:].any()


@pytest.mark.parametrize(("span", "given"), [(1, 3), (1, 14), (4, 1), (4, 3), ("sequence", 1)])
def test_given_plan_is_used_and_missing_plans_are_sampled(tiny_model, tokens_like, span, given):
    model, tokens = tiny_model(plan_span=span, latent_dim=16), tokens_like(2, 6)
    plan = model.sample_plan(2, given)
    plans = spied_plans(model)
    text = seeded(model, tokens, plan=plan, **SAMPLED)
    total = num_plans(span, 6 + NEW)
    assert torch.equal(plans[-1][:, :given], plan)
    assert plans[-1].shape == (2, max(total, given), 16)
    if total > given:
        drawn = plans[-1][:, given:]
        assert drawn.any(-1).all()
        assert not drawn.all(-1).any()
    assert torch.equal(seeded(model, tokens, plan=plan, use_cache=False, **SAMPLED), text)


@pytest.mark.parametrize("span", SPANS)
def test_given_plan_changes_what_is_written(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(1, 6)
    plan = model.sample_plan(1, num_plans(span, 6 + NEW))
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    one, other = (model.generate(tokens, plan=each, **options).logits for each in (plan, ~plan))
    assert all((one[step] - other[step]).abs().max() > 1e-3 for step in range(NEW))


def test_one_plan_for_all_prompts_equals_the_same_plan_for_each(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=4), tokens_like(3, 6)
    plan = model.sample_plan(1, 4)
    each = model.generate(tokens, plan=plan.expand(3, -1, -1).long(), **GREEDY)
    assert torch.equal(model.generate(tokens, plan=plan[0], **GREEDY), each)
    assert torch.equal(model.generate(input_ids=tokens, plan=plan[0], **GREEDY), each)


@pytest.mark.parametrize(
    "options", [{"prompt_plan": "prior"}, {"plan": torch.zeros(2, 4, dtype=torch.bool)}], ids=["prior", "plan"]
)
def test_encoder_does_not_run_where_nothing_is_read_from_the_prompt(tiny_model, tokens_like, options):
    model, tokens = without_encoder(tiny_model(plan_span=4)), tokens_like(2, 6)
    model.generate(tokens, **options, **GREEDY)
    with pytest.raises(AssertionError, match="the encoder ran"):
        model.generate(tokens, **GREEDY)


def test_returned_sequences_draw_their_own_plans_but_share_a_given_one(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span="sequence", latent_dim=16, readout_init_scale=0.1), tokens_like(2, 6)
    plans = spied_plans(model)
    assert seeded(model, tokens, num_return_sequences=3, **SAMPLED).shape == (6, 6 + NEW)
    assert len({tuple(plan.flatten().tolist()) for plan in plans[-1]}) == 6
    given = model.sample_plan(2, 1)
    text = seeded(model, tokens, num_return_sequences=3, plan=given, **SAMPLED)
    assert torch.equal(plans[-1], given.repeat_interleave(3, 0))
    assert torch.equal(text[:, :6], tokens.repeat_interleave(3, 0))


def test_streamer_receives_the_tokens_as_they_are_written(tiny_model, tokens_like):
    class Streamer:
        def __init__(self):
            self.received, self.ended = [], False

        def put(self, value):
            self.received.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    text = tiny_model(plan_span=4).generate(tokens_like(1, 6), streamer=streamer, **SAMPLED)
    assert streamer.received == text[0].tolist()
    assert streamer.ended


def test_text_stops_at_the_end_token(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=4), tokens_like(1, 6)
    plan = model.sample_plan(1, 4)
    text = model.generate(tokens, plan=plan, **GREEDY)
    end = text[0, 8].item()
    stopped = model.generate(tokens, plan=plan, eos_token_id=end, **GREEDY)[0]
    assert torch.equal(stopped, text[0, : len(stopped)])
    assert stopped[-1] == end
    assert len(stopped) <= 9


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.2}]
)
def test_sampling_options_are_those_of_transformers(tiny_model, tokens_like, options):
    text = seeded(tiny_model(plan_span=4), tokens_like(2, 6), **options, **SAMPLED)
    assert text.shape == (2, 6 + NEW)


def test_top_k_of_one_is_greedy(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=4), tokens_like(2, 6)
    plan = model.sample_plan(2, 4)
    greedy = model.generate(tokens, plan=plan, **GREEDY)
    assert torch.equal(model.generate(tokens, plan=plan, top_k=1, **SAMPLED), greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"generation_config": GenerationConfig(num_beams=3, max_new_tokens=4)}, "num_beams=3"),
        ({"prompt_lookup_num_tokens": 3}, "without an assistant"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=4)}, "without an assistant"),
        ({"assistant_early_exit": 2}, "without an assistant"),
    ],
)
def test_beams_and_assistants_are_refused(tiny_model, tokens_like, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(tokens_like(1, 6), **options)


def test_assistant_model_is_refused(tiny_model, tokens_like):
    model = tiny_model()
    with pytest.raises(ValueError, match="without an assistant"):
        model.generate(tokens_like(1, 6), assistant_model=model, **GREEDY)


def test_beams_of_the_model_s_own_generation_config_are_refused(tiny_model, tokens_like):
    model = tiny_model()
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams=2"):
        model.generate(tokens_like(1, 6), **GREEDY)


def test_unknown_source_of_the_prompt_s_plans_is_refused(tiny_model, tokens_like):
    with pytest.raises(ValueError, match=r"prompt_plan='encoder': one of \('posterior', 'prior'\)"):
        tiny_model().generate(tokens_like(1, 6), prompt_plan="encoder", **GREEDY)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (3, 2, 4), (2, 0, 4)])
def test_plan_of_another_shape_is_refused(tiny_model, tokens_like, shape):
    with pytest.raises(ValueError, match=r"plan of shape .*expected"):
        tiny_model(plan_span=4).generate(tokens_like(2, 6), plan=torch.zeros(shape, dtype=torch.bool), **GREEDY)


def test_plan_of_other_values_than_bits_is_refused(tiny_model, tokens_like):
    with pytest.raises(ValueError, match="values other than bits"):
        tiny_model(plan_span=4).generate(tokens_like(2, 6), plan=torch.full((2, 4), 7), **GREEDY)


@pytest.mark.parametrize("as_dict", [False, True])
def test_text_longer_than_the_model_was_built_for_is_written_with_a_warning(tiny_model, tokens_like, as_dict):
    model = tiny_model(plan_span=5, max_seq_len=8)  # half the context is shorter than a plan
    options = {**GREEDY, "return_dict_in_generate": as_dict}
    with pytest.warns(UserWarning, match=r"15 tokens were generated, but the model was built for 8 \(max_seq_len\)"):
        out = model.generate(tokens_like(1, 6), **options)
    assert (out.sequences if as_dict else out).shape == (1, 15)


def test_text_within_the_trained_length_gives_no_warning(tiny_model, tokens_like, recwarn):
    tiny_model(plan_span=4, max_seq_len=15).generate(tokens_like(1, 6), **GREEDY)
    assert not [warning for warning in recwarn if "max_seq_len" in str(warning.message)]


@pytest.mark.parametrize("span", SPANS)
def test_text_continues_from_a_cache_under_its_plan(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(2, 6)
    plan = model.sample_plan(2, num_plans(span, 6 + NEW))
    expected = model.generate(tokens, plan=plan, **GREEDY)
    cache = DynamicCache(config=model.config)
    begun = model.generate(tokens, plan=plan, past_key_values=cache, do_sample=False, max_new_tokens=4)
    assert cache.get_seq_length() == 9
    text = model.generate(begun, plan=plan, past_key_values=cache, do_sample=False, max_new_tokens=NEW - 4)
    assert torch.equal(text, expected)


def test_cache_without_the_plan_that_wrote_it_is_refused(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=4), tokens_like(1, 6)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match="Pass that plan too, plan="):
        model.generate(tokens, past_key_values=cache, **GREEDY)


def test_empty_cache_needs_no_plan(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=4), tokens_like(2, 6)
    cache = DynamicCache(config=model.config)
    assert torch.equal(seeded(model, tokens, past_key_values=cache, **SAMPLED), seeded(model, tokens, **SAMPLED))
