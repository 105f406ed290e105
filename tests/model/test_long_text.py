"""
Texts longer than the model was trained for, against a loop that reads the tokens of each context anew for every token,
without a cache, one text at a time.
"""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StoppingCriteria

from free_transformer.model.cache import PlanCache
from free_transformer.model.layout import num_plans

LIMIT = 16
NEW = 53
SPANS = [1, 4, "sequence"]
PAD = 0
CACHES = [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}]


def contexts(prompt_length, new, span, changes=()):
    """The number of tokens that have been dropped before each new token."""
    step, dropped, found = 1 if span == "sequence" else span, 0, []
    while prompt_length - dropped > LIMIT:
        dropped += step
    for length in range(prompt_length, prompt_length + new):
        if length - dropped > LIMIT or length - prompt_length in changes:
            while length - dropped > LIMIT // 2:
                dropped += step
        found.append(dropped)
    return found


@torch.no_grad()
def reference_logits(model, text, prompt_length, plan, changes=None):
    """Logits of each new token of a text, (N, V), under its plan, (P, H)."""
    span, changes, found = model.config.plan_span, changes or {}, []
    starts = contexts(prompt_length, len(text) - prompt_length, span, changes)
    for index, dropped in enumerate(starts):
        plan = changes.get(index, plan)
        if index + 1 < len(starts) and starts[index + 1] == dropped and index + 1 not in changes:
            continue  # the last token of a context reads all of it
        seen = text[dropped : prompt_length + index]
        first = 0 if span == "sequence" else dropped // span
        plans = plan[first : first + num_plans(span, len(seen))]
        new = index + 1 - len(found)
        found += model(seen[None], plan=plans, use_cache=False).logits[0, -new:]
    return torch.stack(found)


@torch.no_grad()
def greedy_reference(model, prompt, plan, new=NEW, changes=None):
    span, changes, text = model.config.plan_span, changes or {}, prompt
    for index, dropped in enumerate(contexts(len(prompt), new, span, changes)):
        plan, seen = changes.get(index, plan), text[dropped:]
        first = 0 if span == "sequence" else dropped // span
        logits = model(seen[None], plan=plan[first : first + num_plans(span, len(seen))], use_cache=False).logits
        text = torch.cat([text, logits[0, -1].argmax()[None]])
    return text


def left_padded(prompts):
    longest = max(len(prompt) for prompt in prompts)
    tokens, mask = torch.full((2, len(prompts), longest), PAD)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    return tokens, mask


@pytest.fixture
def model_like(tiny_model):
    return lambda span, **changes: tiny_model(plan_span=span, max_seq_len=LIMIT, **changes)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("span", SPANS)
def test_greedy_text_is_that_of_the_reference(model_like, tokens_like, span, length):
    model, prompt = model_like(span), tokens_like(1, length)
    plan = model.sample_plan(1, num_plans(span, length + NEW))[0]
    text = model.generate(prompt, plan=plan, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(text[0], greedy_reference(model, prompt[0], plan))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lengths", [(6, 6, 6), (9, 3, 16), (40, 2, 17)])
@pytest.mark.parametrize("span", SPANS)
def test_each_step_has_the_logits_of_the_reference(model_like, tokens_like, span, lengths, cache):
    model, prompts = model_like(span), [tokens_like(length) for length in lengths]
    tokens, mask = left_padded(prompts)
    options = {"do_sample": True, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(tokens, attention_mask=mask, **options, **cache)
    logits = torch.stack(out.logits, 1).double()
    assert out.plan.shape[1] == num_plans(span, max(lengths) + NEW)
    for row, length in enumerate(lengths):
        text = out.sequences[row, max(lengths) - length :]
        assert torch.equal(text[:length], prompts[row])
        assert_close(logits[row], reference_logits(model, text, length, out.plan[row]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(5, 5), (12, 4), (30, 9)])
@pytest.mark.parametrize("span", SPANS)
def test_sampled_text_is_the_same_with_any_cache(model_like, tokens_like, span, lengths):
    model = model_like(span)
    tokens, mask = left_padded([tokens_like(length) for length in lengths])
    texts = []
    for options in CACHES:
        torch.manual_seed(3)
        texts.append(model.generate(tokens, attention_mask=mask, do_sample=True, max_new_tokens=NEW, **options))
    assert torch.equal(texts[1], texts[0]) and torch.equal(texts[2], texts[0])


def test_sampled_text_is_that_of_a_seeded_reference(model_like, tokens_like):
    model, prompt = model_like("sequence"), tokens_like(4)
    plan = model.sample_plan(1, 1)[0]
    torch.manual_seed(3)
    text = model.generate(prompt[None], plan=plan, do_sample=True, top_k=0, max_new_tokens=NEW)[0]
    torch.manual_seed(3)
    torch.randint(2**62, ())  # the seed of plans of new text
    expected = prompt
    for index in range(NEW):
        logits = reference_logits(model, torch.cat([expected, prompt[:1]]), len(prompt), plan)[index]
        expected = torch.cat([expected, torch.multinomial(logits.float().softmax(-1), 1)])
    assert torch.equal(text, expected)


@pytest.mark.parametrize("span", SPANS)
def test_longer_text_starts_with_the_shorter_one(model_like, tokens_like, span):
    model, tokens = model_like(span), tokens_like(2, 5)
    texts = []
    for new in (9, NEW):
        torch.manual_seed(3)
        texts.append(model.generate(tokens, do_sample=True, max_new_tokens=new))
    assert torch.equal(texts[1][:, : 5 + 9], texts[0])


def test_holes_and_padding_on_the_right_leave_the_text_as_it_is(model_like, tokens_like):
    model, prompt = model_like(4), tokens_like(1, 9)
    plan = model.sample_plan(1, num_plans(4, 9 + NEW))[0]
    expected = model.generate(prompt, plan=plan, do_sample=False, max_new_tokens=NEW)[0, 9:]
    tokens = torch.full((2, 14), PAD)
    places = torch.tensor([0, 1, 3, 4, 5, 7, 8, 10, 11])
    tokens[0, places], tokens[1, :9] = prompt[0], prompt[0]
    mask = torch.zeros_like(tokens)
    mask[0, places], mask[1, :9] = 1, 1
    for options in CACHES:
        text = model.generate(tokens, attention_mask=mask, plan=plan, do_sample=False, max_new_tokens=NEW, **options)
        assert torch.equal(text[:, 14:], expected.expand(2, -1))


def test_padding_alone_fills_no_context(model_like, tokens_like):
    model, prompt = model_like("sequence"), tokens_like(1, 3)
    plan = model.sample_plan(1, 1)[0]
    tokens = torch.cat([torch.full((1, 30), PAD), prompt], 1)
    for options in CACHES:
        found = model.generate(
            tokens, attention_mask=tokens.ne(PAD).long(), plan=plan, do_sample=False, max_new_tokens=NEW, **options
        )
        assert torch.equal(found[0, 30:], model.generate(prompt, plan=plan, do_sample=False, max_new_tokens=NEW)[0])


@pytest.mark.parametrize("lengths", [(6, 6), (11, 3)])
@pytest.mark.parametrize("cache", CACHES)
def test_plan_changes_where_asked(model_like, tokens_like, lengths, cache):
    model, prompts = model_like("sequence"), [tokens_like(length) for length in lengths]
    first, second, third = (model.sample_plan(2, 1) for _ in range(3))
    tokens, mask = left_padded(prompts)
    out = model.generate(
        *(tokens,),
        attention_mask=mask,
        plan=first,
        plan_changes={30: third, 3: second, NEW: first},
        do_sample=False,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        **cache,
    )
    assert torch.equal(out.plan, third)
    for row, prompt in enumerate(prompts):
        changes = {3: second[row], 30: third[row]}
        expected = greedy_reference(model, prompt, first[row], changes=changes)
        assert torch.equal(out.sequences[row, max(lengths) - len(prompt) :], expected)


def test_plan_changes_as_text_and_of_returned_sequences(model_like, tokens_like):
    model, tokens = model_like("sequence", plan_names={"calm": "0110"}), tokens_like(2, 5)
    options = {"do_sample": True, "top_k": 1, "max_new_tokens": 20, "num_return_sequences": 2}
    text = model.generate(tokens, plan="calm", plan_changes={7: "1001"}, **options)
    plan, later = torch.tensor([[False, True, True, False]]), torch.tensor([[True, False, False, True]])
    for row in range(4):
        assert torch.equal(text[row], greedy_reference(model, tokens[row // 2], plan, 20, {7: later}))


@pytest.mark.parametrize("changes", [{0: "0110"}, {-1: "0110"}, {"2": "0110"}, {True: "0110"}, ["0110"], {3: "01"}])
def test_wrong_plan_changes_are_refused(model_like, tokens_like, changes):
    with pytest.raises(ValueError, match="plan"):
        model_like("sequence").generate(tokens_like(1, 4), plan_changes=changes, max_new_tokens=5)


def test_plan_changes_need_one_plan_per_text(model_like, tokens_like):
    with pytest.raises(ValueError, match="plan_changes needs one plan per text"):
        model_like(4).generate(tokens_like(1, 4), plan_changes={3: "0110"}, max_new_tokens=5)


class RecordedTokens:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class AfterTokens(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_streamers_stopping_criteria_and_end_tokens_keep_working(model_like, tokens_like):
    model, prompt = model_like("sequence"), tokens_like(1, 4)
    plan = model.sample_plan(1, 1)[0]
    expected = greedy_reference(model, prompt[0], plan)
    options = {"plan": plan, "do_sample": False, "max_new_tokens": NEW}
    streamer = RecordedTokens()
    model.generate(prompt, streamer=streamer, **options)
    assert streamer.ended and streamer.tokens == expected.tolist()
    stopped = model.generate(prompt, stopping_criteria=[AfterTokens(40)], **options)
    assert torch.equal(stopped[0], expected[:40])
    end = int(expected[45])
    place = next(index for index in range(4, len(expected)) if expected[index] == end)
    ended = model.generate(prompt, eos_token_id=end, **options)
    assert torch.equal(ended[0], expected[: place + 1])


def test_a_text_that_has_ended_does_not_change_the_others(model_like, tokens_like):
    model = model_like("sequence")
    prompts = [tokens_like(5), tokens_like(9)]
    plan = model.sample_plan(2, 1)
    expected = [greedy_reference(model, prompt, bits) for prompt, bits in zip(prompts, plan, strict=True)]
    end = int(expected[0][5 + 2])
    tokens, mask = left_padded(prompts)
    texts = model.generate(
        tokens, attention_mask=mask, plan=plan, eos_token_id=end, do_sample=False, max_new_tokens=NEW
    )
    until = expected[1].tolist().index(end, 9) + 1 if end in expected[1][9:] else len(expected[1])
    assert torch.equal(texts[1, :until], expected[1][:until])


def test_cache_holds_at_most_the_trained_length_and_half_of_the_steps_read_again(model_like, tokens_like):
    model, tokens = model_like("sequence"), tokens_like(3, 5)
    read, columns = [], []

    def watch(_module, _inputs, given, output):
        read.append(given["position_ids"].shape[1])
        columns.append(output.past_key_values.get_seq_length())

    model.register_forward_hook(watch, with_kwargs=True)
    out = model.generate(tokens, do_sample=True, max_new_tokens=200, return_dict_in_generate=True)
    assert max(columns) == LIMIT
    assert out.past_key_values.get_seq_length() <= LIMIT
    assert sum(read) <= 2 * 205


@pytest.mark.parametrize("span", SPANS)
def test_returned_cache_continues_step_by_step(model_like, tokens_like, span):
    model, prompt = model_like(span), tokens_like(1, 5)
    plan = model.sample_plan(1, num_plans(span, 5 + NEW))[0]
    out = model.generate(prompt, plan=plan, do_sample=False, max_new_tokens=27, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, PlanCache) and cache.get_seq_length() <= LIMIT
    logits = model(out.sequences[:, -1:], past_key_values=cache).logits[0, -1]
    text = torch.cat([out.sequences[0], prompt[0, :1]])
    assert_close(logits, reference_logits(model, text, 5, plan)[27], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [None, "own"])
@pytest.mark.parametrize("span", SPANS)
def test_generate_continues_a_long_text_from_its_cache(model_like, tokens_like, span, given):
    model, prompt = model_like(span), tokens_like(1, 5)
    plan = model.sample_plan(1, num_plans(span, 5 + 60))[0]
    cache = None if given is None else DynamicCache(config=model.config)
    options = {"do_sample": False, "return_dict_in_generate": True, "past_key_values": cache}
    out = model.generate(prompt, plan=plan, max_new_tokens=30, **options)
    options["past_key_values"] = out.past_key_values
    again = model.generate(out.sequences, plan=plan, max_new_tokens=NEW - 30, **options)
    expected = greedy_reference(model, out.sequences[0], plan, NEW - 30)  # a prompt of 35 tokens
    assert torch.equal(again.sequences[0], expected)
    with pytest.raises(ValueError, match="Pass the whole text"):
        model.generate(again.sequences[:, -3:], plan=plan, **{**options, "past_key_values": again.past_key_values})


@pytest.mark.parametrize("span", [4, "sequence"])
def test_long_prompt_is_read_at_its_end(model_like, tokens_like, span):
    model = model_like(span)
    model.plan_mapper.forward = lambda plan_logits, generator=None: plan_logits > 0
    prompts = [tokens_like(43), tokens_like(7), tokens_like(18)]
    tokens, mask = left_padded(prompts)
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    for row, prompt in enumerate(prompts):
        dropped = contexts(len(prompt), 1, span)[0]
        read = model.infer_plan(prompt[None, dropped:])[0] > 0
        first = 0 if span == "sequence" else dropped // span
        assert torch.equal(out.plan[row, first : first + len(read)], read)


def test_long_prompt_takes_given_plans_first(model_like, tokens_like):
    model, tokens = model_like(4), tokens_like(2, 30)
    for count in (2, 6, 9):
        plan = model.sample_plan(2, count)
        out = model.generate(tokens, plan=plan, max_new_tokens=4, return_dict_in_generate=True)
        assert torch.equal(out.plan[:, :count], plan[:, : out.plan.shape[1]])


def test_encoder_does_not_run_when_text_is_read_again(model_like, tokens_like):
    model, calls = model_like("sequence"), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.generate(tokens_like(2, 5), max_new_tokens=NEW)
    assert len(calls) == 1


def test_embeddings_and_plans_longer_than_half_the_context_give_a_warning(model_like, tokens_like):
    model, tokens = model_like("sequence"), tokens_like(1, 5)
    with pytest.warns(UserWarning, match="the model was built for 16"):
        model.generate(inputs_embeds=model.model.embed_tokens(tokens), max_new_tokens=20)
    with pytest.warns(UserWarning, match="the model was built for 16"):
        model_like(12).generate(tokens, max_new_tokens=20)


def test_long_text_gives_no_warning(model_like, tokens_like, recwarn, caplog):
    model_like(4).generate(tokens_like(1, 6), max_new_tokens=40)
    assert not [warning for warning in recwarn if "max_seq_len" in str(warning.message)]
    assert not [record for record in caplog.records if "maximum length" in record.message]


@pytest.mark.parametrize("span", SPANS)
def test_cache_of_a_short_text_continues_past_the_trained_length(model_like, tokens_like, span):
    model, prompt, more = model_like(span), tokens_like(1, 9), tokens_like(1, 25)
    plan = model.sample_plan(1, num_plans(span, 34 + 20))[0]
    cache = model(prompt, plan=plan, prompt_plan="prior", use_cache=True).past_key_values
    whole = torch.cat([prompt, more], 1)
    text = model.generate(whole, plan=plan, past_key_values=cache, do_sample=False, max_new_tokens=20)
    assert torch.equal(text[0], greedy_reference(model, whole[0], plan, 20))
