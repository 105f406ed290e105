"""Settings at their edges: Python, the command line, ONNX and the server accept and refuse the same."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_serving import build_model, post, running, save_model

from free_transformer.cli.main import main
from free_transformer.data import byte_tokenizer
from free_transformer.deploy import OnnxFreeTransformer
from free_transformer.export.onnx import export_onnx
from free_transformer.serving.app import create_app
from free_transformer.serving.torch_batch import TorchBatch

TINY = sys.float_info.min / 2**40  # a subnormal number
# as docs/serving.md has them
ACCEPTED = [
    *({"temperature": value} for value in (0, 0.0, 1e-45, TINY, 1e-6, 1, 100)),
    *({"top_p": value} for value in (0, 0.0, TINY, 0.5, 1)),
    *({"top_k": value} for value in (0, 1, 259, 10**9, 2**63, 10**400)),
    *({"seed": value} for value in (0, -1, 2**63, 2**64 - 1, -(2**63))),
    {"top_p": 0, "top_k": 1, "temperature": 1e-45},
    {"plan": "0110"},
    {"plan": "0,1 10"},
    *({"prompt_plan": value} for value in ("posterior", "prior")),
    {"prompt": ""},
]
REFUSED = [
    *({"temperature": value} for value in (-1, -TINY, 100.1, math.nan, math.inf)),
    *({"top_p": value} for value in (-0.1, 1.1, math.nan, math.inf)),
    *({"top_k": value} for value in (-1, -(10**400))),
    *({"seed": value} for value in (2**64, 10**400, -(2**63) - 1)),
    *({"plan": value} for value in ("011", "01100110", "0110 0110", "01x0", "", "01 1")),
    {"prompt_plan": "both"},
    {"prior": "both"},
    {"prior": "aggregate"},  # which this model has not gathered
    {"max_new_tokens": -1},
    {"max_new_tokens": 0},
]
TOKENS_REFUSED = [[256, 259], [-1], [256, 10**6], [2**40], []]


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    """For each way to generate a function of the settings, which raises ValueError for rejected values."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = save_model(folder / "model", plan_span="sequence", max_seq_len=64), byte_tokenizer()
    export_onnx(model, folder / "onnx", tokenizer)
    exported = OnnxFreeTransformer(folder / "onnx")

    def python(tokens: list[int], **settings):
        settings.pop("seed", None)  # that is PyTorch's
        return model.generate(torch.tensor([tokens], dtype=torch.long), do_sample=True, **settings)

    def onnx(tokens: list[int], **settings):
        return exported.generate([tokens], do_sample=True, **settings)

    def command(path, capsys, monkeypatch, prompt: str, **settings) -> None:
        line = [each for name, value in settings.items() for each in (f"--{name.replace('_', '-')}={value}",)]
        monkeypatch.setattr(sys, "argv", ["free-transformer", "generate", str(path), "--prompt", prompt, *line])
        with pytest.raises(SystemExit) as stopped:
            main()
        error = capsys.readouterr().err
        if stopped.value.code:
            assert stopped.value.code == 2 and "Traceback" not in error and error.count("\n") == 1
            raise ValueError(error)

    def server(prompt: str | list[int], **settings) -> None:
        settings["max_tokens"] = settings.pop("max_new_tokens")
        status, answer = post(f"{address}/v1/completions", json.dumps({"prompt": prompt, **settings}).encode())
        if status != 200:
            assert status == 400, answer
            raise ValueError(answer["error"]["message"])

    with running(create_app(lambda: TorchBatch(model, tokenizer), "tiny")) as address:
        yield SimpleNamespace(python=python, onnx=onnx, command=command, server=server, folder=folder)


def verdicts(routes, settings: dict, capsys, monkeypatch) -> dict[str, str | None]:
    """By route: its error message, None if it accepted the settings."""
    settings = {"max_new_tokens": 2, **settings}
    prompt = settings.pop("prompt", "a")
    tokens = [256, *prompt.encode()]
    calls = {
        "Python": lambda: routes.python(tokens, **settings),
        "ONNX": lambda: routes.onnx(tokens, **settings),
        "command": lambda: routes.command(routes.folder / "model", capsys, monkeypatch, prompt, **settings),
        "command, ONNX": lambda: routes.command(routes.folder / "onnx", capsys, monkeypatch, prompt, **settings),
        "server": lambda: routes.server(prompt, **settings),
    }
    if "seed" in settings:
        del calls["Python"]
    found: dict[str, str | None] = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = None
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("settings", ACCEPTED, ids=lambda settings: str(settings)[:40])
def test_all_accept(routes, settings, capsys, monkeypatch):
    assert set(verdicts(routes, settings, capsys, monkeypatch).values()) == {None}


@pytest.mark.parametrize("settings", REFUSED, ids=lambda settings: str(settings)[:40])
def test_all_refuse_in_one_line_with_the_name(routes, settings, capsys, monkeypatch):
    found = verdicts(routes, settings, capsys, monkeypatch)
    (name,) = settings
    named = {"max_new_tokens": ("max_new_tokens", "max-new-tokens", "max_tokens")}.get(
        name, (name, name.replace("_", "-"))
    )
    for route, said in found.items():
        assert said is not None, route
        is_json = route == "server" and name in ("temperature", "top_p") and not math.isfinite(settings[name])
        assert "not JSON" in said if is_json else any(each in said for each in named), (route, said)
        assert len(said) < 400


@pytest.mark.parametrize("tokens", TOKENS_REFUSED)
def test_token_ids_outside_the_vocabulary_are_refused(routes, tokens):
    for call in (routes.python, routes.onnx, routes.server):
        with pytest.raises(ValueError, match=r"token|prompt"):
            call(tokens, max_new_tokens=2)


def test_edge_values_mean_the_same_everywhere(routes):
    """The most likely token: of temperature 0 and less than float32 can divide by, of top_p 0 and of top_k 1."""
    tokens = [256, *b"abc"]
    for generate in (routes.python, routes.onnx):
        greedy = np.asarray(generate(tokens, max_new_tokens=6, plan="0110", temperature=0)).tolist()
        for settings in ({"temperature": TINY}, {"temperature": 1e-45}, {"top_p": 0}, {"top_k": 1}):
            assert np.asarray(generate(tokens, max_new_tokens=6, plan="0110", **settings)).tolist() == greedy, settings


def test_padding_may_be_on_either_side(routes):
    left = [[258, 258, 256, 97, 98], [256, 97, 98, 99, 100]], [[0, 0, 1, 1, 1], [1] * 5]
    right = [[256, 97, 98, 258, 258], [256, 97, 98, 99, 100]], [[1, 1, 1, 0, 0], [1] * 5]
    model = build_model(plan_span=2, max_seq_len=64)
    plan = torch.rand(2, 6, 4) < 0.5
    for repeats in (1, 3):
        options = {"plan": plan, "max_new_tokens": 8, "do_sample": False, "num_return_sequences": 1}
        found = []
        for ids, mask in (left, right):
            ids, mask = torch.tensor(ids * repeats), torch.tensor(mask * repeats)
            options["plan"] = plan.repeat(repeats, 1, 1)
            found.append(model.generate(ids, attention_mask=mask, **options))
            assert torch.equal(found[-1][:, :5], ids)
        assert torch.equal(found[0][:, 5:], found[1][:, 5:])


@pytest.mark.filterwarnings("error::UserWarning")
def test_all_generate_texts_longer_than_the_model_was_trained_for(routes, capsys, monkeypatch):
    settings = {"max_new_tokens": 80, "temperature": 0}
    for generate in (routes.python, routes.onnx):
        assert generate([256, 97], eos_token_id=-1, **settings).shape == (1, 82)
    for kind in ("model", "onnx"):
        routes.command(routes.folder / kind, capsys, monkeypatch, "a", plan="0110", **settings)
    routes.server("a", **settings)
    with pytest.raises(ValueError, match="max_tokens=4097: this server generates at most 4096"):
        routes.server("a", max_new_tokens=4097)
