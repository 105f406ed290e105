"""Real clients: OpenAI's package, requests of LangChain and LiteLLM, lm-eval, browsers and proxies."""

import contextlib
import json
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from openai import BadRequestError, NotFoundError, OpenAI
from test_serving import build_model, metric, post, running
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from enumeration import all_plans
from free_transformer.data import byte_tokenizer
from free_transformer.deploy import OnnxFreeTransformer
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.export.onnx import export_onnx
from free_transformer.integrations.harness import PlanHarnessLM
from free_transformer.serving.app import create_app
from free_transformer.serving.chat import ChatTemplate
from free_transformer.serving.detokenizer import Detokenizer, TokenTexts
from free_transformer.serving.onnx_batch import OnnxBatch
from free_transformer.serving.torch_batch import TorchBatch

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPT = [256, *b"Once upon"]


@pytest.fixture(scope="module")
def model():
    model = build_model(plan_span="sequence", max_seq_len=128)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def address(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with running(create_app(lambda: TorchBatch(model, tokenizer, max_rows=4), "tiny/one")) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def get(url: str, method: str = "GET", **headers: str) -> SimpleNamespace:
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        answer = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        answer = error
    return SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read())


def test_logprobs_match_the_model(client, model):
    plan = torch.tensor([[0, 1, 1, 0]]).bool()
    request = {"model": "tiny/one", "prompt": PROMPT, "extra_body": {"plan": "0110"}, "seed": 3}
    answer = client.completions.create(**request, max_tokens=6, logprobs=3, echo=True).choices[0]
    written = client.completions.create(**request, max_tokens=6, logprobs=3).choices[0]
    found = answer.logprobs
    texts = TokenTexts(byte_tokenizer().backend_tokenizer)
    by_name = {texts.shown(token): token for token in range(259)}
    tokens = [by_name[name] for name in found.tokens]
    assert tokens[: len(PROMPT)] == PROMPT and len(tokens) == len(found.token_logprobs) == len(PROMPT) + 6
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), plan=plan).logits[0].double().log_softmax(-1)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for place, token in enumerate(tokens[1:]):
        assert found.token_logprobs[place + 1] == pytest.approx(expected[place, token].item(), abs=1e-4)
        best = sorted(found.top_logprobs[place + 1].values(), reverse=True)[:3]
        assert best == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)
    assert found.text_offset[: len(PROMPT) + 1] == [0, *range(len(PROMPT))]
    assert written.logprobs.token_logprobs == pytest.approx(found.token_logprobs[len(PROMPT) :], abs=1e-5)
    assert client.completions.create(**request, max_tokens=2, logprobs=0).choices[0].logprobs.token_logprobs
    chunks = list(client.completions.create(**request, max_tokens=6, logprobs=3, echo=True, stream=True))
    streamed = [value for chunk in chunks for value in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == found.token_logprobs


@pytest.mark.parametrize(
    ("span", "kind"), [("sequence", "torch"), (4, "torch"), pytest.param(4, "onnx", marks=pytest.mark.slow)]
)
def test_prompt_scores_average_over_plans(span, kind, tmp_path, monkeypatch):
    """Against a sum over plans in float64, with the prompt read in several parts."""
    model = build_model(plan_span=span, max_seq_len=64)
    monkeypatch.setattr("free_transformer.serving.batch.SCORED_VALUES", 7 * 259)
    tokens = [256, *b"averaged over plans"]
    batch = TorchBatch(model, byte_tokenizer())
    if kind == "onnx":
        export_onnx(model, tmp_path / "onnx", byte_tokenizer())
        batch = OnnxBatch(OnnxFreeTransformer(tmp_path / "onnx"))
    plans = all_plans(4)[:, None] if span == "sequence" else torch.rand(5, batch.num_plans(len(tokens)), 4) < 0.5
    log_weights = torch.rand(len(plans), dtype=torch.float64).log()
    with torch.no_grad():
        logits = model.double()(torch.tensor([tokens] * len(plans)), plan=plans).logits
    own = logits.log_softmax(-1)[:, :-1].gather(2, torch.tensor([tokens[1:]] * len(plans))[..., None])[..., 0]
    joint = (log_weights[:, None] + own.cumsum(1)).logsumexp(0)
    before = torch.cat([log_weights.logsumexp(0)[None], joint[:-1]])
    model.float()
    *_, found = batch.score_prompt(tokens, plans.numpy(), 2, log_weights.numpy())
    scores, following = found.scores, found.next_log_probs
    assert [score.log_prob for score in scores[1:]] == pytest.approx((joint - before).tolist(), abs=1e-4)
    weights = (log_weights + own.sum(1)).softmax(0)
    expected = (weights[:, None] * logits[:, -1].softmax(-1)).sum(0).log()
    assert following == pytest.approx(expected.numpy(), abs=1e-4)
    assert all(score.top[0][1] >= score.log_prob for score in scores[1:])


def test_prompt_scores_are_the_exact_likelihood(client, model):
    """Where all plans can be enumerated. The plan is never read from the text that is scored."""
    batches = [{"input_ids": torch.tensor([PROMPT])}]
    exact = evaluate_likelihood(model, batches, method="exact")
    request = {"model": "tiny/one", "prompt": [PROMPT], "logprobs": 1, "echo": True, "temperature": 0}
    for most in (0, 1):
        choice = client.completions.create(**request, max_tokens=most).choices[0]
        values = choice.logprobs.token_logprobs[1 : len(PROMPT)]
        assert -np.mean(values) == pytest.approx(exact.nll, abs=1e-4)
        assert choice.plan is None and len(choice.logprobs.token_logprobs) == len(PROMPT) + most
    assert len(choice.text) >= len("Once upon")


def test_lm_eval_over_http_matches_in_process(address, model, tmp_path):
    """Without an effect of the plan, both are the model's own scores; otherwise texts get their exact likelihood."""
    byte_tokenizer().save_pretrained(tmp_path)
    options = {"model": "tiny/one", "tokenizer": str(tmp_path), "tokenizer_backend": "huggingface", "max_length": 128}

    def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
        return [
            Instance(request_type=kind, doc={}, arguments=each, idx=index, metadata=("task", index, 1))
            for index, each in enumerate(arguments)
        ]

    pairs = requests("loglikelihood", [("The cat", " sat"), ("One two", " three"), ("", " begin")])
    neutral = build_model(plan_span="sequence", max_seq_len=128)
    torch.nn.init.zeros_(neutral.plan_table.weight)
    with running(create_app(lambda: TorchBatch(neutral, byte_tokenizer()), "tiny/one")) as other:
        lm = LocalCompletionsAPI(base_url=f"{other}/v1/completions", add_bos_token=True, batch_size=2, **options)
        ours = PlanHarnessLM(neutral, tokenizer=byte_tokenizer(), prompt_plan="prior")
        for (value, greedy), (expected, as_greedy) in zip(
            lm.loglikelihood(pairs), ours.loglikelihood(pairs), strict=True
        ):
            assert value == pytest.approx(expected, abs=1e-3) and greedy == as_greedy
    lm = LocalCompletionsAPI(base_url=f"{address}/v1/completions", add_bos_token=True, **options)
    ((value, _),) = lm.loglikelihood(requests("loglikelihood", [("", "Once upon")]))
    exact = evaluate_likelihood(model, [{"input_ids": torch.tensor([PROMPT])}], method="exact")
    assert value == pytest.approx(-exact.nll * (len(PROMPT) - 1), abs=1e-3)


def test_fields_of_other_clients_are_accepted(client, address):
    langchain = {
        "temperature": 0.7,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "n": 1,
        "logit_bias": {},
    }
    answer = client.completions.create(model="tiny/one", prompt=["a", "b"], max_tokens=4, **langchain)
    assert len(answer.choices) == 2
    litellm = {"user": "someone", "stream_options": {"include_usage": True}, "stop": None, "seed": None}
    chunks = list(client.completions.create(model="tiny/one", prompt="a", max_tokens=2, stream=True, **litellm))
    assert chunks[-1].usage.completion_tokens == 2
    nulls = dict.fromkeys(["best_of", "echo", "logprobs", "max_tokens", "n", "suffix", "temperature", "plan", "top_k"])
    assert post(f"{address}/v1/completions", json.dumps({"prompt": "a", **nulls}).encode())[0] == 200


def test_chat_matches_completion_of_rendered_template(client):
    messages = [{"role": "user", "content": "hi"}]
    request = {"model": "tiny/one", "messages": messages, "max_tokens": 6, "seed": 1, "extra_body": {"plan": "0110"}}
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    same = client.completions.create(
        model="tiny/one", prompt="user: hi\nassistant: ", max_tokens=6, seed=1, extra_body={"plan": "0110"}
    )
    choice = answer.choices[0]
    assert choice.message.content == same.choices[0].text and choice.plan == "0110"
    assert answer.usage == same.usage
    assert len(choice.logprobs.content) == 6 and len(choice.logprobs.content[0].top_logprobs) == 2
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    again = client.chat.completions.create(**{**request, "messages": parts}, stream=True)
    chunks = list(again)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    whole = client.chat.completions.create(model="tiny/one", messages=messages, seed=1)  # as much as fits
    assert whole.usage.total_tokens == 128 or whole.choices[0].finish_reason == "stop"
    for bad in ([], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        with pytest.raises(BadRequestError, match="messages"):
            client.chat.completions.create(model="tiny/one", messages=bad)
    with pytest.raises(BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny/one", messages=messages, tools=[{"type": "function"}])


def test_chat_without_template_is_rejected(model):
    with running(create_app(lambda: TorchBatch(model, byte_tokenizer()), "tiny")) as address:
        status, answer = post(f"{address}/v1/chat/completions", b'{"messages": []}')
        assert status == 400 and "no chat template: use /v1/completions" in answer["error"]["message"]


def test_chat_templates_run_in_a_sandbox(tmp_path):
    def render(template: str, messages=({"role": "user", "content": "a<b"},)) -> str:
        return ChatTemplate(template, {"bos_token": "<s>"}).render(list(messages))

    text = "{{ bos_token }}{% generation %}{{ messages | tojson }}{% endgeneration %}{{ eos_token }}"
    assert render(text) == '<s>[{"role": "user", "content": "a<b"}]'
    with pytest.raises(ValueError, match=r"messages: the model's chat template rejects them \(no system"):
        render("{{ raise_exception('no system message') }}")
    with pytest.raises(ValueError, match="rejects them"):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="chat template cannot be read"):
        render("{% if %}")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tools": "x"}
    tokenizer.save_pretrained(tmp_path)
    found = ChatTemplate.from_folder(tmp_path)
    assert found.render([{"role": "user", "content": "x"}]) == "<|begin|>user: x\nassistant: "


def test_models_by_name(client, address):
    assert client.models.retrieve("tiny/one").id == client.models.list().data[0].id == "tiny/one"
    with pytest.raises(NotFoundError, match="model 'other': this server has 'tiny/one'"):
        client.models.retrieve("other")


def test_routes_methods_and_headers(address):
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        answer = get(f"{address}{path}", "HEAD")
        assert answer.status == 200 and answer.body == b""
    missing = get(f"{address}/v1/embeddings")
    assert missing.status == 404 and b"POST /v1/completions" in missing.body
    wrong = get(f"{address}/v1/completions")
    assert wrong.status == 405 and b"use POST" in wrong.body
    body = b'{"prompt": "a", "max_tokens": 2, "stream": true}'
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    headers = urllib.request.urlopen(request).headers
    assert headers["Cache-Control"] == "no-cache" and headers["X-Accel-Buffering"] == "no"


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 200), ("localhost", 200), ("[::1]:80", 200), ("LOCALHOST.", 200), ("example.com", 403), ("", 403)],
)
def test_other_host_names_are_rejected(model, host, status):
    from free_transformer.serving.access import local_hosts

    app = create_app(lambda: TorchBatch(model, byte_tokenizer()), "tiny", allowed_hosts=local_hosts("127.0.0.1"))
    with running(app) as address:
        assert get(f"{address}/v1/models", Host=host).status == status
        with contextlib.suppress(KeyError):
            assert metric(address, 'requests_total{status="403"}') == (status == 403)


def test_cors_allows_the_configured_origins(model):
    build = lambda: TorchBatch(model, byte_tokenizer())  # noqa: E731
    asking = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    with running(create_app(build, "tiny", token="secret", cors_origins=["http://page"])) as address:
        preflight = get(f"{address}/v1/completions", "OPTIONS", **asking)
        assert preflight.status == 200 and preflight.headers["Access-Control-Allow-Origin"] == "http://page"
        assert get(f"{address}/v1/models", Origin="http://page").status == 401
    with running(create_app(build, "tiny")) as address:
        assert "Access-Control-Allow-Origin" not in get(f"{address}/v1/models", Origin="http://page").headers


@pytest.mark.parametrize("shown", ["bearer secret", "BEARER secret", "Bearer  secret"])
def test_token_is_checked_before_the_body(model, shown):
    app = create_app(lambda: TorchBatch(model, byte_tokenizer()), "tiny", token="secret")
    with running(app) as address:
        url = f"{address}/v1/completions"
        assert post(url, b'{"max_tokens": 1}', Authorization=shown)[0] == 200
        for body in (b"{", b'{"unknown": 1}', b"a" * 10**6):
            assert post(url, body)[0] == 401
        answer = get(f"{address}/v1/models", Authorization="Basic secret")
        assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: letters, a marker for spaces, and byte fallback for everything else."""
    names = ["<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a marker for the space before them, as in SentencePiece."""
    names = ["<s>", "</s>", "<pad>", "<unk>", "▁one", "▁two", "▁three", "▁four"]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:4]])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TOKENIZERS = {"bytes": byte_tokenizer, "fallback": fallback_tokenizer, "words": word_tokenizer}
TEXTS = ["one two three four", "two one", " one", "one"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", [*TEXTS, "é🙂 añ", "a🙂"])
def test_prompt_and_pieces_equal_the_decoded_text(kind, text):
    tokenizer = TOKENIZERS[kind]()
    if kind == "words" and text not in TEXTS:
        return
    texts = TokenTexts(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    for seam in range(len(tokens) + 1):
        detokenizer = Detokenizer(texts, tokens[:seam])
        pieces = [detokenizer.add(token) for token in tokens[seam:]]
        assert detokenizer.prompt + "".join(pieces) + detokenizer.end() == texts.decode(tokens), seam


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_invalid_utf8_becomes_replacement_characters(kind):
    tokenizer = TOKENIZERS[kind]()
    texts = TokenTexts(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    first = 3 if kind == "fallback" else 0
    detokenizer = Detokenizer(texts)
    raw = b"\xff" + "é".encode() + b"\xe2\x82" + b"\xff"
    assert "".join(detokenizer.add(first + byte) for byte in raw) + detokenizer.end() == raw.decode(errors="replace")
    assert texts.shown(first + 0xE2) == r"bytes:\xe2"
    assert TokenTexts(word_tokenizer().backend_tokenizer).shown(5) == " two"
