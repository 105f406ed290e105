"""The page to play with plans, without a browser: texts, links, the survey of plans, and HTML output."""

import asyncio
import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from conftest import TINY
from free_transformer import FreeTransformer, FreeTransformerConfig, build_baseline
from free_transformer.cli.main import main
from free_transformer.data import byte_tokenizer
from free_transformer.errors import InputError
from free_transformer.evaluation.usage import LIVE_BITS as USAGE_LIVE_BITS
from free_transformer.evaluation.usage import plan_usage
from free_transformer.explorer import markup
from free_transformer.explorer.app import create_explorer
from free_transformer.explorer.choices import Choices
from free_transformer.explorer.explored import COLUMNS, ROWS, Explored
from free_transformer.explorer.generation import GrowingText, generate, token_effects
from free_transformer.explorer.handlers import Form, Handlers
from free_transformer.explorer.layout import FORM
from free_transformer.explorer.sources import open_model
from free_transformer.explorer.survey import LIVE_BITS, SURVEY_FILE, BitUse, Passage, PlanSurvey, survey_plans
from free_transformer.model.plan_text import format_bits, parse_bits
from free_transformer.serving.torch_batch import TorchBatch

TOKENS = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
BITS = 4
TEXT = "<script>alert(1)</script> & <b>bold</b>"


def build(**changes) -> FreeTransformer:
    torch.manual_seed(0)
    config = {**TINY, **TOKENS, "num_layers": 2, "latent_dim": BITS, "plan_span": "sequence", "max_seq_len": 64}
    model = FreeTransformer(FreeTransformerConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        model.plan_table.weight.normal_()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its baseline, and held-out text with sources."""
    path = tmp_path_factory.mktemp("explored") / "tiny"
    build().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    build_baseline(build().config).save_pretrained(path / "baseline")
    byte_tokenizer().save_pretrained(path / "baseline")
    rows = [{"text": f"{TEXT} {index} " * 4, "label": f"<i>{index % 2}</i>"} for index in range(6)]
    (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def app(folder):
    return create_explorer(open_model(folder, data=[str(folder / "text.jsonl")]))


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, base_url="http://127.0.0.1") as found:
        yield found


@pytest.fixture(scope="module")
def explored(app, client) -> Explored:  # the engine runs as long as the client is there
    return app.state.explored


@pytest.fixture(scope="module")
def choices(explored) -> Choices:
    return Choices("ab", "0110", words=3, length=12, temperature=1.0).checked(explored.batch)


def last(stream):
    async def collect():
        return [each async for each in stream][-1]

    return asyncio.run(collect())


def texts_of(html: str) -> list[str]:
    return re.findall(r"<div class=ft-text>(.*?)</div>", html, re.S)


def form(explored, **changes) -> Form:
    start = {
        "prompt": "",
        "plan": "0110",
        "bits": "0110",
        "words": 0,
        "others": 0,
        "temperature": 1.0,
        "length": 5,
        "tab": "grid",
        "names": {},
        "before": "0110",
        "place": 0,
        "shuffled": False,
        "pasted": "",
        "pasted_plan": "",
        "change": 0,
        "map_plan": "0110",
        "name": "",
        "named": None,
        "opened": True,
    }
    assert list(start) == list(FORM)
    return Handlers(explored).form(*{**start, **changes}.values())


def test_the_page_and_the_api_are_one_server(client):
    page = client.get("/")
    assert page.status_code == 200 and "tiny" in page.text
    assert not re.findall(r"<(?:script|link)[^>]+https?://", page.text)
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_grid_has_plans_in_rows_and_random_numbers_in_columns(explored, choices):
    grid = last(explored.grid(choices, False, {}))
    assert len(texts_of(grid)) == (ROWS + 1) * COLUMNS  # and the baseline
    again = last(explored.grid(choices, False, {}))
    assert texts_of(again) == texts_of(grid)
    shuffled = last(explored.grid(choices, True, {}))
    for column in range(COLUMNS):  # each column has the same texts in another order
        assert sorted(texts_of(shuffled)[column : ROWS * COLUMNS : COLUMNS]) == sorted(
            texts_of(grid)[column : ROWS * COLUMNS : COLUMNS]
        )


def test_the_baseline_s_row_is_what_the_baseline_generates(explored, choices, folder):
    greedy = Choices("ab", "0110", temperature=0.0, length=12).checked(explored.batch)
    shown = texts_of(last(explored.grid(greedy, False, {})))[-1]
    from transformers import AutoModelForCausalLM

    baseline, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "baseline"), byte_tokenizer()
    tokens = torch.tensor([[256, *b"ab"]])
    found = baseline.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    assert shown == markup.escape(tokenizer.decode(found[0, 3:], skip_special_tokens=True))


def test_the_copied_request_gives_the_text_of_the_page(client, explored, choices):
    shown = texts_of(last(explored.grid(choices, False, {})))[0]
    words = shlex.split(choices.curl("http://127.0.0.1", "tiny"))
    answer = client.post(words[1], content=words[-1], headers={"Content-Type": "application/json"})
    assert markup.escape(answer.json()["choices"][0]["text"]) == shown


def test_the_copied_python_runs(choices, folder, capsys):
    exec(compile(choices.python(str(folder)), "copied", "exec"), {})
    assert capsys.readouterr().out.startswith("ab")


@pytest.mark.parametrize(
    "changes", [{}, {"prompt": TEXT + " é\n+%"}, {"temperature": 0.35, "tab": "flip", "others": 4, "length": 77}]
)
def test_a_link_restores_what_it_was_copied_from(explored, choices, changes):
    wanted = replace(choices, **changes)
    query = dict(parse_qsl(urlsplit(wanted.link("http://127.0.0.1:1", "tiny")).query, keep_blank_values=True))
    opened = Handlers(explored).open_link(query)
    assert Choices(**{name: opened[name] for name in vars(wanted)}) == wanted


@pytest.mark.parametrize(
    ("query", "message"),
    [({"plan": "01x1"}, "cannot be used"), ({"plan": "0110 0110"}, "one plan per text"), ({"model": "other"}, "other")],
)
def test_a_link_that_does_not_fit_says_so_and_the_page_opens(explored, monkeypatch, query, message):
    told = []
    monkeypatch.setattr("gradio.Warning", told.append)
    assert Handlers(explored).open_link(query)["plan"] == explored.start().plan
    assert message in told[0]


def test_numbers_out_of_range_are_limited(explored):
    wild = Choices("", "0110", words=-7, temperature=99.0, length=10**9, tab="nowhere").checked(explored.batch)
    assert (wild.words, wild.temperature, wild.length, wild.tab) == (7, 2.0, 1000, "grid")


def test_flipped_bits_change_the_text_and_nothing_else(explored, choices):
    assert re.search(r"with bit \d flipped", last(explored.flip(choices, choices.plan, {}))[0])
    same = GrowingText("a", ended=True)
    assert "The two texts are the same." in markup.difference(same, same, ("", ""))
    pair, tokens = last(explored.flip(choices, "1001", {}))
    first = int(re.search(r"first difference is at character (\d+)", pair)[1]) - 1
    one, other = (re.sub("<.*?>", "", text) for text in texts_of(pair))
    assert one[:first] == other[:first] and one[first] != other[first]
    assert tokens.count("ft-token ") == 2 + 12  # the prompt's bytes too


def test_the_effect_on_tokens_is_that_of_the_model(explored):
    """Against the enumeration of all plans."""
    model, plan = build(), parse_bits("0110", BITS)
    effects = asyncio.run(token_effects(explored.engine, [256, *b"abcdef"], [plan, parse_bits("1001", BITS)]))
    tokens = torch.tensor([[256, *b"abcdef"]])
    codes = [f"{code:04b}" for code in range(16)]
    with torch.no_grad():
        log_probs = torch.cat([model(tokens, plan=each).logits.double().log_softmax(-1) for each in codes])
    own = log_probs[:, :-1].gather(2, tokens[:, 1:, None].expand(16, -1, 1))[..., 0]
    before = torch.nn.functional.pad(own.cumsum(1)[:, :-1], (1, 0))
    average = (own + before).logsumexp(0) - before.logsumexp(0)
    np.testing.assert_allclose([each.gain for each in effects], own[6] - average, atol=1e-4)
    most_likely = log_probs[9].exp()[:-1].max(-1)
    np.testing.assert_allclose([each.likely[1][0][1] for each in effects], most_likely.values, atol=1e-5)


def test_a_pasted_text_is_continued_under_its_plan_and_then_under_another(explored, choices):
    plan, certainty = asyncio.run(explored.read("some text"))
    ones = build().infer_plan(torch.tensor([[256, *b"some text"]]))[0].sigmoid()
    assert plan == format_bits(ones > 0.5)
    assert [float(each) for each in re.findall(r"width: ([\d.]+)%", certainty)] == pytest.approx(
        (100 * ones[0]).tolist(), abs=0.06
    )
    kept = last(explored.continuation(choices, "some text", plan, None, {}))
    changed = last(explored.continuation(choices, "some text", plan, 5, {}))
    whole = texts_of(kept)[0]
    assert len(texts_of(kept)) == 1 and len(texts_of(changed)) == 2
    assert whole.startswith(texts_of(changed)[0]) and "".join(texts_of(changed)) != whole


def test_a_text_with_several_plans_has_a_lane(tmp_path):
    build(plan_span=4).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    explored = create_explorer(open_model(tmp_path)).state.explored
    assert explored.survey is None
    start = form(explored, tab="lane", length=10, plan=explored.start().plan)
    handlers = Handlers(explored)
    chosen = handlers.choose_place(start, "2")
    flipped = handlers.flip(replace(start, place=2, bits="1111" if chosen["bits"] == "0000" else "0000"))
    plans = [each.split() for each in (flipped["before"], flipped["plan"])]
    assert [place for place in range(len(plans[0])) if plans[0][place] != plans[1][place]] == [2]
    before, after = (
        last(handlers.show_tab(replace(start, plan=plan), "http://x"))["laned"] for plan in map(" ".join, plans)
    )
    before, after = texts_of(before)[0], texts_of(after)[0]
    assert before[:7] == after[:7]  # token 8, the first of plan 2, is the text's eighth byte


def test_the_survey_is_that_of_the_evaluation(explored):
    """Bits per position and information against `plan_usage`, plans against `infer_plan`."""
    model = build()
    batch = TorchBatch(model, byte_tokenizer())
    passages = [Passage([256, *bytes([97 + index] * 9)], source=str(index % 2)) for index in range(12)]
    found = survey_plans(batch, passages, max_seconds=60)
    logits = torch.cat([model.infer_plan(torch.tensor([each.tokens]))[0] for each in passages])
    usage = plan_usage(logits, free_bits=1.0)
    np.testing.assert_allclose([bit.spent for bit in found.bits], usage.bits_per_position, atol=1e-4)
    assert sum(bit.information for bit in found.bits) == pytest.approx(usage.information, abs=1e-4)
    assert sum(sum(counts.values()) for counts in found.counts.values()) == 12
    assert found.counts[format_bits(logits[:1] > 0)]["0"] >= 1
    assert LIVE_BITS == USAGE_LIVE_BITS


def test_a_survey_is_stored_and_a_damaged_one_is_refused(explored, tmp_path):
    assert explored.survey.sources == ["<i>0</i>", "<i>1</i>"] and explored.survey.passages == 12
    explored.survey.save(tmp_path)
    assert PlanSurvey.load(tmp_path, BITS) == explored.survey
    assert PlanSurvey.load(tmp_path / "nothing", BITS) is None
    with pytest.raises(InputError, match="other plans than 7 bits"):
        PlanSurvey.load(tmp_path, 7)
    (tmp_path / SURVEY_FILE).write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a survey"):
        PlanSurvey.load(tmp_path, BITS)


def test_text_stays_text(explored, choices):
    growing = GrowingText(TEXT, failure=TEXT)
    pages = [
        markup.grid([markup.GridRow("title", [growing])], [0]),
        markup.difference(growing, GrowingText("x"), ("", "")),
        markup.changed_text(GrowingText(TEXT, change=9), "", ""),
        markup.plan_title("0110", explored.survey, TEXT),
        markup.plan_map(explored.survey, BITS, "0110"),
        markup.plan_details(explored.survey, max(explored.survey.counts)),
        last(explored.flip(replace(choices, prompt=TEXT), "1001", {}))[1],
    ]
    for page in pages:
        assert "<script" not in page and "<b>bold" not in page and "<i>0" not in page


def test_neighbors_on_the_map_differ_by_one_bit():
    by_rank = sorted((f"{code:05b}" for code in range(32)), key=markup.gray_rank)
    assert [markup.gray_rank(each) for each in by_rank] == list(range(32))
    for one, other in itertools.pairwise(by_rank):
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1


@pytest.mark.parametrize(
    ("handler", "changes", "message"),
    [
        ("type_plan", {"plan": "01"}, "has 2 bits"),
        ("type_plan", {"plan": "verse"}, "plan 'verse'"),
        ("use_read_plan", {}, "read its plan first"),
        ("save_name", {"name": "01 0"}, "give a word"),
        ("choose_on_map", {}, "plan 'x'"),
    ],
)
def test_bad_input_is_told_in_one_line(explored, handler, changes, message):
    choice = ["x"] if handler == "choose_on_map" else []
    with pytest.raises(InputError, match=message):
        getattr(Handlers(explored), handler)(form(explored, **changes), *choice)


def test_names_belong_to_the_visitor(explored):
    handlers = Handlers(explored)
    names = handlers.save_name(form(explored, name=" verse ", plan="1001"))["names"]
    assert names == {"verse": "1001"}
    assert handlers.use_name(form(explored, names=names, named="verse"))["plan"] == "1001"
    assert handlers.type_plan(form(explored, names=names, plan="verse"))["plan"] == "1001"
    with pytest.raises(InputError):
        handlers.type_plan(form(explored, plan="verse"))


def test_other_plans_differ_in_live_bits_and_a_new_plan_is_another_one(explored):
    before = form(explored)
    drawn = Handlers(explored).new_plan(before)
    assert drawn["before"] == before.plan and drawn["others"] == 1
    assert Handlers(explored).new_plan(before) == drawn


def test_a_grid_shows_every_source_and_then_other_bits(explored):
    counts = {"0000": {"a": 90}, "0001": {"a": 80}, "0100": {"a": 70}, "1000": {"b": 2}, "1100": {"c": 1}}
    live, dead = BitUse(1.0, 1.0, 0.5), BitUse(0.0, 0.0, 0.5)
    varied = replace(explored, survey=PlanSurvey([live, live, dead, dead], counts, passages=243))
    for others in range(10):
        plans = varied.sampled_plans(Choices(plan="0000", others=others), 4, beside="0000")
        assert {format_bits(plan) for plan in plans[:2]} == {"1000", "1100"}
        assert [format_bits(plan) for plan in plans[2:]] == ["0100", "0001"]  # bit 3 is dead


def test_ten_visitors_at_once_get_the_texts_that_each_would_get_alone(explored, choices):
    alone = [texts_of(last(explored.grid(replace(choices, words=seed), False, {}))) for seed in range(10)]

    async def visit(seed: int) -> list[str]:
        return texts_of([each async for each in explored.grid(replace(choices, words=seed), False, {})][-1])

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(visit(seed) for seed in range(10)))

    assert asyncio.run(all_of_them()) == alone


def test_a_visitor_who_leaves_frees_the_engine(explored, choices):
    async def leave() -> None:
        stream = explored.grid(replace(choices, length=1000), False, {})
        await anext(stream)
        await stream.aclose()
        requests = [explored._request(choices, choices.bits(explored.batch), 0)]
        async for _ in generate(explored.engine, requests):
            pass
        assert not explored.engine._texts and not explored.engine._waiting

    asyncio.run(leave())


def test_a_folder_for_a_space_holds_all_that_it_needs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["free-transformer", "explore", str(folder), "--space", str(tmp_path / "space")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    space = tmp_path / "space"
    compile((space / "app.py").read_text(), "app.py", "exec")
    assert "sdk: gradio" in (space / "README.md").read_text()
    opened = open_model(space / "model", name="again")
    assert opened.baseline == (space / "model" / "baseline").resolve()
    assert opened.build().latent_dim == BITS
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["free-transformer", "explore", str(folder), "--space", str(tmp_path / "taken")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "thesis.txt" in capsys.readouterr().err


def test_the_run_of_train_baseline_beside_a_model_is_its_baseline(folder, tmp_path):
    model, beside = tmp_path / "mine", tmp_path / "mine-baseline"
    shutil.copytree(folder, model, ignore=shutil.ignore_patterns("baseline"))
    beside.mkdir()
    assert open_model(model).baseline is None  # not trained yet
    shutil.copytree(folder / "baseline", beside / "model")
    assert open_model(model).baseline == beside.resolve()


@pytest.mark.parametrize(("name", "message"), [("missing", "no such folder"), ("empty", "neither a trained run")])
def test_a_folder_without_a_model_is_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        open_model(tmp_path / name)
