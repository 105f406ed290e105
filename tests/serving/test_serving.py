"""The server: responses against single requests and `generate`, limits, and disconnecting clients."""

import asyncio
import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError, OpenAI

from conftest import TINY
from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.cli.main import main
from free_transformer.data import byte_tokenizer
from free_transformer.evaluation.plan_ops import plan_of_text
from free_transformer.model.plan_text import format_bits
from free_transformer.model.sampling import PLANS, Sampling
from free_transformer.runtime import arrays
from free_transformer.serving.access import max_body
from free_transformer.serving.app import create_app, listen
from free_transformer.serving.batch import Example, TextRequest
from free_transformer.serving.detokenizer import Detokenizer, TokenTexts
from free_transformer.serving.requests import Limits, prepare_completion
from free_transformer.serving.schema import CompletionRequest
from free_transformer.serving.torch_batch import TorchBatch, sample_tokens
from rows import write_in_rows

TOKENS = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def build_model(**changes) -> FreeTransformer:
    torch.manual_seed(0)
    model = FreeTransformer(FreeTransformerConfig(**{**TINY, **TOKENS, "num_layers": 2, **changes})).eval()
    with torch.no_grad():  # so that plans change texts
        model.plan_table.weight.normal_()
    return model


def save_model(folder: Path, **changes) -> FreeTransformer:
    """A model and the byte tokenizer in a folder."""
    model = build_model(**changes)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@contextlib.contextmanager
def running(app):
    """The address of an application that uvicorn serves from a thread."""
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def model():
    return build_model(plan_span=5, max_seq_len=128)


@pytest.fixture(scope="module")
def address(model):
    app = create_app(lambda: TorchBatch(model, byte_tokenizer(), max_rows=24), "tiny", max_prompt=60, max_waiting=300)
    with running(app) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def metric(address: str, name: str) -> float:
    page = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = re.findall(rf"^free_transformer_{re.escape(name)} (\S+)", page, re.M)
    return float(found[0]) if found else 0.0


def wait_for(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition was not met within a minute")


def test_response_contains_the_plan_and_is_reproducible(client):
    request = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "seed": 7}
    one, other = (client.completions.create(**request) for _ in range(2))
    choice = one.choices[0]
    assert re.fullmatch(r"([01]{4} ){3}[01]{4}", choice.plan)  # ceil((6 + 11) / 5) plans
    assert choice.text == other.choices[0].text and choice.plan == other.choices[0].plan
    assert one.usage.prompt_tokens == 6 and one.usage.total_tokens == 6 + one.usage.completion_tokens
    under = client.completions.create(**request, extra_body={"plan": choice.plan})
    assert under.choices[0].text == choice.text  # tokens have their own random stream
    other_plan = choice.plan.translate(str.maketrans("01", "10"))
    assert client.completions.create(**request, extra_body={"plan": other_plan}).choices[0].text != choice.text


def test_greedy_text_matches_generate(client, model):
    plan = model.sample_plan(1, 8)
    prompt = torch.tensor([[256, *b"Once"]])
    written = model.generate(prompt, plan=plan, max_new_tokens=30, do_sample=False)
    bits = plan[0].int().tolist()
    answer = client.completions.create(
        model="tiny", prompt="Once", max_tokens=30, temperature=0, extra_body={"plan": bits}
    )
    tokenizer = byte_tokenizer()
    assert answer.choices[0].text == tokenizer.decode(written[0, 5:], skip_special_tokens=True)
    by_tokens = client.completions.create(
        model="tiny", prompt=prompt[0].tolist(), max_tokens=30, temperature=0, echo=True, extra_body={"plan": bits}
    )
    assert by_tokens.choices[0].text == "Once" + answer.choices[0].text


def test_plan_sources(client, model):
    def plan(**options) -> str:
        body = {name: options.pop(name) for name in ("plan_from", "prompt_plan", "prior") if name in options}
        answer = client.completions.create(model="tiny", max_tokens=1, extra_body=body, **options)
        return answer.choices[0].plan

    example = "An example of twenty-"
    read = format_bits(plan_of_text(model, byte_tokenizer(), example))
    assert plan(prompt=example, plan_from=example) == read
    # here the posterior is nearly certain, and the prior is uniform
    sure = model.infer_plan(torch.tensor([[256, *example.encode()]])).abs().min(-1).values[0] > 4
    seeds = range(8)
    of_prompt = [plan(prompt=example, seed=seed).split() for seed in seeds]
    assert all(each[i] == read.split()[i] for each in of_prompt for i in range(len(sure)) if sure[i])
    assert len({plan(prompt=example, prompt_plan="prior", seed=seed) for seed in seeds}) == len(seeds)
    assert len({plan(prompt="", seed=seed) for seed in seeds}) > 1
    with pytest.raises(BadRequestError, match="has no aggregate prior"):
        plan(prompt="", prior="aggregate")


def test_the_plan_of_an_example_longer_than_the_context_is_read_as_by_the_command_line():
    model, text = build_model(plan_span="sequence", max_seq_len=24), "".join(map(chr, range(32, 127))) * 3
    batch = TorchBatch(model, byte_tokenizer())
    asked = TextRequest([batch.begin], 1, plan_from=Example(batch.encode(text)))
    assert np.array_equal(batch.add(asked).plan, plan_of_text(model, byte_tokenizer(), text).numpy())


def test_an_example_is_read_once_for_all_texts_of_a_request(monkeypatch):
    batch = TorchBatch(build_model(plan_span="sequence", max_seq_len=24), byte_tokenizer())
    read, infer_plan = [], batch.infer_plan
    monkeypatch.setattr(batch, "infer_plan", lambda tokens: (read.append(tokens), infer_plan(tokens))[1])
    body = CompletionRequest(prompt=["a", "b"], n=2, max_tokens=2, plan_from="an example" * 5)
    texts = prepare_completion(body, batch, Limits(prompt=24, new=24, texts=4))
    plans = {batch.add(text).plan.tobytes() for text in texts}
    assert len(texts) == 4 and len(plans) == 1
    assert len(read) == 3  # windows: 50 tokens, 23 in each


def test_stratified_plans_of_n_texts(client):
    """16 texts have each plan of 4 bits once, in each place; another prompt of the request has plans of its own."""
    request = {"model": "tiny", "prompt": ["Hello", "Bye"], "n": 16, "max_tokens": 12, "seed": 3}
    options = {"plans": "stratified", "prompt_plan": "prior"}
    answers = [client.completions.create(**request, extra_body=options) for _ in range(2)]
    plans = [choice.plan.split() for choice in answers[0].choices]
    for texts in (plans[:16], plans[16:]):
        assert all(len(set(place)) == 16 for place in zip(*texts, strict=True))
    assert [choice.text for choice in answers[0].choices] == [choice.text for choice in answers[1].choices]
    one = {**request, "n": 1}
    alone = [client.completions.create(**one, extra_body={**options, "plans": plans}) for plans in PLANS]
    assert alone[0].choices[0].plan == alone[1].choices[0].plan


def test_stream_matches_the_whole_response(client):
    request = {"model": "tiny", "prompt": ["Hello", "Bye"], "max_tokens": 20, "seed": 3, "n": 2}
    whole = client.completions.create(**request)
    texts, plans, ends = [""] * 4, [[] for _ in range(4)], [None] * 4
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        plans[choice.index].append(choice.plan)
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert [each[0] for each in plans] == [choice.plan for choice in whole.choices]
    assert all(plan is None for each in plans for plan in each[1:])
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert len(chunks) > 8 and chunks[-1].usage == whole.usage
    assert texts[0] != texts[1]  # each text of a prompt has its own random stream
    alone = client.completions.create(**{**request, "prompt": "Bye"})
    assert [choice.text for choice in alone.choices] == texts[2:]


def test_200_concurrent_requests_match_single_requests(address):
    """Bit-for-bit, whatever else is being generated."""

    def request(number: int) -> dict:
        steering = [{"plan": f"{number % 16:04b}"}, {"plan_from": "f" * number}, {"prompt_plan": "prior"}, {}]
        sampling = [{"temperature": 0}, {"temperature": 0.8}, {"top_p": 0.7}, {"extra_body": {"top_k": 5}}]
        made = {"prompt": "abcdefghij"[: number % 11], "max_tokens": 4 + number % 17, "seed": number}
        made |= sampling[number // 4 % 4]
        return {**made, "extra_body": {**made.get("extra_body", {}), **steering[number % 4]}}

    async def ask(client, number: int):
        choice = (await client.completions.create(model="tiny", **request(number))).choices[0]
        return choice.text, choice.plan, choice.finish_reason

    async def everything():
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(200)))
            return together, [await ask(client, number) for number in range(200)]

    together, alone = asyncio.run(everything())
    assert together == alone
    assert len({text for text, *_ in alone}) > 150
    assert metric(address, "running_texts") == 0 and metric(address, "waiting_texts") == 0


@pytest.mark.parametrize(
    ("span", "shape"),
    [
        *((span, {"max_seq_len": 400}) for span in (1, 4, "sequence")),
        *((4, {"max_seq_len": 64, "sliding_window": window}) for window in (1, 20, 64)),
        ("sequence", {"max_seq_len": 128, "sliding_window": 100}),
    ],
)
def test_rows_that_come_and_go_match_generate(span, shape):
    model = build_model(plan_span=span, **shape).double()
    batch = TorchBatch(model, byte_tokenizer(), max_rows=3, max_length=400)
    lengths = [(5, 290), (40, 12), (3, 30), (17, 300), (1, 60), (258, 9)]  # tokens of the prompt, and new ones
    rng = np.random.default_rng(0)
    prompts = [[256, *rng.integers(0, 256, prompt - 1).tolist()] for prompt, _ in lengths]
    plans = [rng.random((batch.num_plans(sum(each) - 1), 4)) < 0.5 for each in lengths]
    written = write_in_rows(batch, prompts, plans, [count for _, count in lengths])
    for prompt, plan, text, (_, count) in zip(prompts, plans, written, lengths, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), plan=torch.from_numpy(plan), max_new_tokens=count, do_sample=False, eos_token_id=-1
        )
        assert expected[0, len(prompt) :].tolist() == text
    if "sliding_window" in shape:  # no more memory than the window needs
        assert batch.cache.keys[0].shape[2] == -(-shape["sliding_window"] // 64) * 64


def test_logits_do_not_depend_on_the_batch_size():
    wide = build_model(hidden_dim=512, num_heads=8, num_kv_heads=2, ffn_hidden_dim=1024, plan_span="sequence")

    def first_text(others: int) -> torch.Tensor:
        batch = TorchBatch(wide, byte_tokenizer(), max_rows=40)
        for length in [7, *(3 + other for other in range(others))]:
            batch.add(TextRequest([256] + [70] * length, 4, plan=np.ones((1, 4), dtype=bool)))
        return torch.stack([batch.step([65] * batch.rows)[0].clone() for _ in range(3)])

    alone = first_text(0)
    assert all(torch.equal(first_text(others), alone) for others in (3, 20, 39))


@given(st.integers(0, 2**32 - 1))
def test_torch_and_numpy_sample_the_same_tokens(seed):
    rng = np.random.default_rng(seed)
    rows, vocabulary = 6, 12
    logits = (3 * rng.normal(size=(rows, vocabulary))).astype(np.float32)
    sampling = [
        Sampling(
            float(rng.choice([0, 1e-45, 1e-5, 0.5, 1, 2])),
            int(rng.integers(0, 14)),
            float(rng.choice([0, 0.1, 0.6, 1])),
        )
        for _ in range(rows)
    ]
    uniform = rng.random(rows)
    settings = np.array([(each.temperature, each.top_k, each.top_p) for each in sampling]).T
    expected = arrays.sample_tokens(logits, *settings, uniform).tolist()
    assert sample_tokens(torch.from_numpy(logits), sampling, uniform) == expected
    one = [
        sample_tokens(torch.from_numpy(logits[i : i + 1]), sampling[i : i + 1], uniform[i : i + 1])[0]
        for i in range(rows)
    ]
    assert one == expected  # whatever the settings of the other rows


@given(st.text(max_size=12), st.text(min_size=1, max_size=3), st.lists(st.integers(0, 258), max_size=6))
def test_pieces_equal_the_text_up_to_the_stop_string(text, stop, more):
    tokenizer = byte_tokenizer().backend_tokenizer
    tokens = [*text.encode(), *more]
    detokenizer = Detokenizer(TokenTexts(tokenizer), stop=[stop])
    shown = []
    for token in tokens:
        shown.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    shown.append(detokenizer.end())
    assert "".join(shown) == tokenizer.decode(tokens, skip_special_tokens=True).split(stop)[0]


def test_a_stop_string_ends_the_text(client):
    request = {"model": "tiny", "prompt": "a", "max_tokens": 40, "seed": 1}
    text = client.completions.create(**request).choices[0].text
    stop = text[10:12]
    answer = client.completions.create(**request, stop=[stop, "never written"])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_token": 3}, "max_token: unknown field; did you mean max_tokens?"),
        ({"plan": "012"}, "plan '012': give its bits as 0 and 1"),
        ({"plan": "011"}, "plan '011' has 3 bits: plans of this model have 4"),
        ({"plan": [0, 2]}, "plan: must be bits as text"),
        ({"plan": "0110", "plan_from": "x"}, "plan: give either plan or plan_from, not both"),
        ({"prompt_plan": "none"}, 'prompt_plan="none"'),
        ({"plans": "spread"}, "plans=\"spread\": Input should be 'independent' or 'stratified'"),
        ({"prompt": {"a": 1}}, "prompt: must be text, token ids, or a list"),
        ({"prompt": []}, "prompt: is an empty list"),
        ({"prompt": [[]]}, "prompt: has no tokens"),
        ({"prompt": [256, 300]}, "prompt: token ids from 256 to 300: the vocabulary has 0 to 258"),
        ({"prompt": "x" * 60}, "prompt: more than 60 tokens, the maximum of this server"),
        ({"max_tokens": 8193}, "max_tokens=8193: this server generates at most 8192"),
        ({"plan_changes": {"3": 7}}, "plan_changes: must be plans keyed by a number of new tokens"),
        ({"plan_changes": {"-3": "0110"}}, "plan_changes: must be plans keyed by a number of new tokens"),
        ({"plan_changes": {"3": "0110"}}, "plan_changes needs one plan per text; with plan_span=5"),
        ({"max_tokens": 0}, "max_tokens=0: must be at least 1, or 0 with echo"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": "NaN"}, 'temperature="NaN"'),
        ({"n": 129}, "n=129"),
        ({"n": 128, "prompt": ["a", "b", "c"]}, "384 texts in one request, but this server accepts at most 324"),
        ({"stop": [""]}, "strings of 1 to 256 characters"),
        ({"logprobs": 21}, "logprobs=21: Input should be less than or equal to 20"),
        ({"best_of": 2}, "best_of=2: only n (1) is supported"),
    ],
)
def test_bad_requests_get_a_one_line_message(address, body, message):
    status, answer = post(f"{address}/v1/completions", json.dumps(body).encode())
    assert status == 400
    assert message in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_other_bad_requests(address):
    url = f"{address}/v1/completions"
    assert post(url, b"{")[0] == 400
    assert post(url, b'{"prompt": "a"}', **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, b'{"model": "gpt"}')[1]["error"]["message"] == "model 'gpt': this server has 'tiny'"
    assert post(f"{address}/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}]}')[0] == 400
    limit = max_body(128)
    status, answer = post(url, b"[" * (limit + 1))
    assert status == 413 and f"exceeds {limit} bytes" in answer["error"]["message"]


def test_token_is_required(model):
    app = create_app(lambda: TorchBatch(model, byte_tokenizer(), max_rows=1), "tiny", token="secret")
    with running(app) as address:
        url = f"{address}/v1/completions"
        assert post(url, b"{}")[0] == 401
        assert post(url, b"{}", Authorization="Bearer sécret")[0] == 401
        assert post(url, b"{}", Authorization="Bearer secret")[0] == 200
        assert urllib.request.urlopen(f"{address}/health").status == 200
        models = OpenAI(base_url=f"{address}/v1", api_key="secret").models.list().data
        assert [(each.id, each.latent_dim) for each in models] == [("tiny", 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a RUN or an export with --onnx FOLDER"),
        (["run", "--onnx", "export"], "give either a RUN or an export"),
        (["{tmp}"], "not a run"),
        (["--onnx", "{tmp}"], "not an export"),
    ],
)
def test_command_reports_missing_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr("sys.argv", ["free-transformer", "serve", "--port", "0", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_port_in_use_is_reported(monkeypatch, capsys, tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["free-transformer", "serve", str(tmp_path), "--port", str(port)])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 1 and "choose another address with --host and --port" in capsys.readouterr().err
