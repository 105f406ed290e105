"""`generate`."""

import re
from pathlib import Path

import pytest
import torch
from cli_cases import KINDS, assert_refused, texts_of
from cli_fixtures import *  # noqa: F403

from free_transformer.data import load_tokenizer
from free_transformer.files import write_text
from free_transformer.model.modeling import FreeTransformer
from free_transformer.training import Run


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_generates_the_same_text(command, runs, kind):
    first, again, other = (
        texts_of(command("generate", runs[kind], "--num-samples", 2, "--max-new-tokens", 12, "--seed", seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 2
    assert first[0] != first[1]


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_0_gives_the_most_likely_text_with_any_seed(command, runs, kind):
    options = ["--temperature", 0, "--max-new-tokens", 8, "--prompt", "the c", *(["--plan", "010"] * (kind == "free"))]
    one, other = (texts_of(command("generate", runs[kind], *options, "--seed", seed)) for seed in (1, 2))
    assert one == other
    assert one[0].startswith("the c")


def test_text_is_written_under_the_plan_given_and_shows_it(command, runs):
    outcome = command("generate", runs["free"], "--plan", "1 0,1", "--num-samples", 3, "--max-new-tokens", 4)
    assert outcome.out.count("plan 101") == 3
    shown = [
        re.findall(r"plan ([01]+)", command("generate", runs["free"], "--num-samples", 8, "--seed", 5).out)
        for _ in range(2)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 8
    assert len(set(shown[0])) > 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_stratified_plans_cover_all_plans(command, runs, temperature):
    options = ["--num-samples", 8, "--max-new-tokens", 4, "--temperature", temperature, "--plans"]
    outcome = command("generate", runs["free"], *options, "stratified")
    assert len(set(re.findall(r"plan ([01]{3})", outcome.out))) == 8
    assert_refused(command("generate", runs["free"], *options, "spread"), 2, "plans='spread': one of")
    assert_refused(command("generate", runs["baseline"], *options, "stratified"), 2, "a baseline has no plan")


def test_text_is_written_under_the_plan_of_an_example(command, runs, tmp_path):
    write_text(tmp_path / "example.txt", "the cat sat")
    model, tokenizer = Run(runs["free"]).load_model(), load_tokenizer("bytes")
    bits = model.infer_plan(torch.tensor([tokenizer("the cat sat")["input_ids"]]))[0, 0] > 0
    expected = "".join("01"[bit] for bit in bits.int().tolist())
    outcome = command("generate", runs["free"], "--plan-from", tmp_path / "example.txt", "--max-new-tokens", 4)
    assert f"plan {expected}" in outcome.out


@pytest.mark.parametrize("kind", KINDS)
def test_stream_generates_the_same_text(command, runs, kind):
    options = ["generate", runs[kind], "--prompt", "a dog", "--max-new-tokens", 10, "--seed", 4]
    streamed = command(*options, "--stream")
    assert streamed.status == 0
    assert streamed.out.strip() == texts_of(command(*options))[0].strip()


def test_prompt_of_markup_and_other_scripts_comes_out_as_it_went_in(command, runs):
    prompt = "[bold]é 🙂[/]"
    assert texts_of(command("generate", runs["free"], "--prompt", prompt, "--max-new-tokens", 1))[0].startswith(prompt)


def test_generate_takes_a_folder_that_save_pretrained_has_written(command, runs):
    one, other = (
        texts_of(command("generate", folder, "--max-new-tokens", 6))
        for folder in (runs["free"], runs["free"] / "model")
    )
    assert one == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "0102"], "give its bits as 0 and 1"),
        (["--plan", ""], "give its bits as 0 and 1"),
        (["--plan", "0101"], "has 4 bits: plans of this model have 3"),
        (["--plan", "010101"], "2 plans.*takes one"),
        (["--plan", "010", "--plan-from", "example.txt"], "not both"),
        (["--plan-from", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--plan-from", "nowhere"], "nowhere"),
        (["--prompt-plan", "guess"], "prompt_plan='guess'"),
        (["--stream", "--num-samples", 2], "use --num-samples 1"),
    ],
)
def test_generate_refuses_what_it_cannot_use(command, runs, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_text(Path("example.txt"), "the cat")
    assert_refused(command("generate", runs["free"], "--max-new-tokens", 2, *options), 2, message)


@pytest.mark.parametrize("options", [["--plan", "010"], ["--plan-from", "text.txt"]])
def test_a_baseline_has_no_plan(command, runs, options):
    assert_refused(command("generate", runs["baseline"], *options), 2, "a baseline has no plan")


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100])
def test_a_damaged_model_is_one_line(command, run, damage):
    (run / "model" / "model.safetensors").write_bytes(damage)
    outcome = command("generate", run)
    assert_refused(outcome, outcome.status, "model")
    assert outcome.status in (1, 2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--num-samples", 0], "--num-samples"),
        (["--num-samples", "many"], "--num-samples"),
        (["--top-p", 2], "top_p=2.0: 0 "),
        (["--seed", 2**64], "seed=18446744073709551616"),
        (["--temperature", "nan"], "temperature=nan: 0 "),
    ],
)
def test_an_option_out_of_range_is_one_line_and_status_2(command, runs, option, message):
    assert_refused(command("generate", runs["free"], *option), 2, message)


def test_a_prompt_is_read_once(command, runs, monkeypatch):
    """By the encoder and by the layers below the plan, also where the plans of the texts are shown."""
    read, original = [], FreeTransformer.lower_layers

    def lower_layers(model, input_ids, *arguments, **options):
        read.append(tuple(input_ids.shape))
        return original(model, input_ids, *arguments, **options)

    monkeypatch.setattr(FreeTransformer, "lower_layers", lower_layers)
    outcome = command("generate", runs["free"], "--prompt", "the cat", "--num-samples", 2, "--max-new-tokens", 3)
    assert outcome.out.count(", plan ") == 2
    assert read == [(2, 8)]


def test_generate_names_plans_and_changes_them_in_a_long_text(command, run):
    model = Run(run).load_model()
    model.config.plan_names, model.config.max_position_embeddings = {"calm": "101", "wild": "010"}, 16
    model.save_pretrained(run / "model")
    options = ["--temperature", 0, "--max-new-tokens", 70]
    outcome = command("generate", run, "--plan", "calm", "--plan-change", "20:wild", *options)
    assert "plan 010" in outcome.out and "max_seq_len" not in outcome.err
    assert texts_of(outcome) == texts_of(command("generate", run, "--plan", "101", "--plan-change", "20:010", *options))
    assert_refused(command("generate", run, "--plan", "clam"), 2, "nor a known name, such as calm")
    assert_refused(command("generate", run, "--plan-change", "x:010"), 2, "--plan-change x:010: give TOKENS:PLAN")
    assert_refused(command("generate", run, "--plan-change", "3:010", "--plan-change", "3:011"), 2, "give only one")
    assert_refused(
        command("generate", run, "--plan-change", "0:010"), 2, "plan_changes: 0 is not a number of new tokens from 1"
    )
