"""A model folder that can be pushed to a hub as it is: weights, code, generation settings, tokenizer, card."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.hf_api
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)
from transformers.utils import hub as transformers_hub

from free_transformer import FreeTransformer, build_baseline
from free_transformer.cli.main import app
from free_transformer.data import byte_tokenizer
from free_transformer.evaluation import compare, evaluate_likelihood
from free_transformer.export.files import save_metadata
from free_transformer.files import write_json
from free_transformer.model.hub_code import AUTO_MAP, code_files
from free_transformer.runs.model_card import MARK, write_model_card
from free_transformer.settings import Settings, parse_settings
from free_transformer.training import Run, train
from hub.load_alone import computed

ALONE = Path(__file__).parents[1] / "hub" / "load_alone.py"
CODE = {file.name for file in code_files()}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
CARD = "README.md"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def auto_map(folder: Path) -> dict | None:
    return json.loads((folder / "config.json").read_text()).get("auto_map")


def settings(folder: Path, name: str = "cats", **sections) -> Settings:
    texts = {name: folder / "secret" / f"{name}.txt" for name in ("train", "held_out")}
    for text in texts.values():
        text.parent.mkdir(exist_ok=True)
        text.write_text("The cat sat on the mat. A dog dug. " * 40)
    values = {
        "model": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "latent_dim": 3, "plan_span": 8}
        | {"sliding_window": 12},
        "training": {"max_steps": 4, "batch_size": 4, "seq_len": 32, "eval_every": 2, "save_every": 2, "device": "cpu"}
        | {"prior_rows": 8},
        "data": {"train": str(texts["train"]), "validation": str(texts["held_out"])},
        "logging": {"tensorboard": False, "sample_every": 0},
    }
    values = {section: {**values[section], **sections.get(section, {})} for section in values}
    return parse_settings({"run_dir": str(folder / name), **values})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    return train(settings(tmp_path_factory.mktemp("runs")), quiet=True)


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A copy, to be changed."""
    shutil.copytree(trained.path, tmp_path / "cats")
    return Run(tmp_path / "cats")


@pytest.fixture
def evaluated(run):
    """Saves `metrics.json`, and returns its content."""

    def evaluate() -> dict:
        model, rows = run.load_model(), run.held_out_rows(run.load_tokenizer())
        run.write_evaluation(evaluate_likelihood(model, rows.in_order(8), 3), rows.bytes_per_token)
        return json.loads(run.evaluation_file.read_text())

    return evaluate


def card_of(run: Run) -> ModelCard:
    return ModelCard.load(run.model_folder / CARD)


def results_of(run: Run) -> dict[str, float]:
    return {result.metric_type: result.metric_value for result in card_of(run).data.eval_results}


# Code


def test_the_model_needs_its_neighbours_and_what_transformers_installs():
    for file in code_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in CODE, f"{file.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                known = {"torch", "transformers", "numpy", "huggingface_hub", *sys.stdlib_module_names}
                assert {module.split(".")[0] for module in modules} <= known, f"{file.name}: {ast.unparse(node)}"


def test_who_has_not_the_package_loads_the_same_model(trained, tmp_path):
    """From a folder, from a hub's cache and from a saved copy, bit-for-bit; and the card's code."""
    torch.save(computed(trained.load_model(), torch.randint(3, 250, (2, 20))), tmp_path / "computed.pt")
    shutil.copytree(trained.model_folder, tmp_path / "cats")
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "hub" / "models--somebody--cats"
    shutil.copytree(trained.model_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    caches = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", ALONE, "cats", "computed.pt", "out", "somebody/cats"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **caches, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "the same, by transformers_modules.cats." in done.stdout
    assert names(tmp_path / "out" / "again") == MODEL | TOKENIZER | CODE
    assert auto_map(tmp_path / "out" / "again") == AUTO_MAP
    for name in CODE:
        assert (tmp_path / "out" / "again" / name).read_bytes() == (trained.model_folder / name).read_bytes()


@pytest.mark.parametrize("trust", [None, True, False])
def test_an_imported_package_provides_the_class_without_trust_remote_code(trained, trust):
    folder = trained.model_folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is FreeTransformer
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is type(model.config)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)("a").input_ids == [256, 97]
    write = pipeline("text-generation", model=str(folder), trust_remote_code=trust)
    assert type(write.model) is FreeTransformer


def test_files_of_a_run_folder(trained):
    assert names(trained.model_folder) == MODEL | TOKENIZER | CODE | {CARD}
    assert auto_map(trained.model_folder) == AUTO_MAP
    assert not list(trained.checkpoints.rglob("*.py"))
    generation = json.loads((trained.model_folder / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256, 257, 258]
    assert not GenerationConfig.from_pretrained(trained.model_folder).do_sample


def test_saved_again_it_is_the_same(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    FreeTransformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert names(tmp_path / "a") == names(tmp_path / "b") == MODEL | CODE
    for name in MODEL | CODE:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class OwnEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.readout = nn.Linear(config.hidden_size, config.latent_dim)

    def forward(self, hidden_states):
        return self.readout(hidden_states)


class OwnModel(FreeTransformer):
    pass


def test_a_model_with_a_part_of_your_own_names_no_code(tiny_model, tiny_config, tmp_path):
    tiny_model().save_pretrained(tmp_path / "encoder")  # the code of the previous one does not belong to it
    FreeTransformer(tiny_config(), encoder=OwnEncoder(tiny_config())).save_pretrained(tmp_path / "encoder")
    OwnModel(tiny_config()).save_pretrained(tmp_path / "model")
    for name in ("encoder", "model"):
        assert auto_map(tmp_path / name) is None
    assert names(tmp_path / "model") == MODEL


def test_a_sharded_model_brings_its_code(tiny_model, tmp_path):
    model = tiny_model()
    model.__class__ = type("FSDPFreeTransformer", (FreeTransformer,), {})  # as fully_shard does
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == MODEL | CODE and auto_map(tmp_path) == AUTO_MAP


def test_an_export_names_no_code(trained, tmp_path):
    save_metadata(trained.load_model(), None, tmp_path)
    assert auto_map(tmp_path) is None and not names(tmp_path) & CODE


def test_foreign_files_are_not_overwritten(tiny_model, tmp_path, caplog):
    (tmp_path / "plan.py").write_text("mine = True\n")
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "plan.py").read_text() == "mine = True\n"
    assert "unrelated files (plan.py)" in caplog.text
    assert names(tmp_path) == MODEL | {"plan.py"} and auto_map(tmp_path) is None
    assert type(FreeTransformer.from_pretrained(tmp_path)) is FreeTransformer


def test_an_older_versions_code_is_replaced(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "plan.py").write_text("old = True\n")
    tiny_model().save_pretrained(tmp_path)
    assert "class PlanTable" in (tmp_path / "plan.py").read_text()


def test_a_llama_keeps_its_generation_settings_and_chat_template(tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    llama.config.auto_map = {"AutoModelForCausalLM": "modeling_other.Other"}
    llama.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, bos_token_id=256, eos_token_id=[257, 299]
    )
    llama.save_pretrained(tmp_path / "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "llama")
    FreeTransformer.from_pretrained(tmp_path / "llama").save_pretrained(tmp_path / "free")
    AutoTokenizer.from_pretrained(tmp_path / "llama").save_pretrained(tmp_path / "free")
    kept = FreeTransformer.from_pretrained(tmp_path / "free").generation_config
    assert kept.to_diff_dict() == llama.generation_config.to_diff_dict()
    assert AutoTokenizer.from_pretrained(tmp_path / "free").chat_template == tokenizer.chat_template
    assert auto_map(tmp_path / "free") == AUTO_MAP


def test_temperature_0_does_not_sample_whatever_the_folder_says(run, capsys):
    file = run.model_folder / "generation_config.json"
    write_json(file, {**json.loads(file.read_text()), "do_sample": True, "temperature": 5.0})
    written = []
    for seed in ("1", "2"):
        arguments = ["--temperature", "0", "--plan", "101101", "--max-new-tokens", "12", "--seed", seed]
        app(["generate", str(run.path), *arguments], standalone_mode=False)
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]


# Pushing


@pytest.fixture
def pushed(monkeypatch) -> dict[str, str]:
    """What would be uploaded: contents by the names in the repository. Nothing is there yet."""
    files: dict[str, bytes] = {}

    def commit(self, repo_id, operations, **_):
        for each in operations:
            with each.as_file() as file:
                files[each.path_in_repo] = file.read()

    def nothing_there(*_, **__):
        raise transformers_hub.EntryNotFoundError("no card")

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **_: huggingface_hub.RepoUrl(f"https://hf.co/{repo_id}")
    )
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)  # which contacts the hub
    monkeypatch.setattr(transformers_hub.ModelCard, "load", nothing_there)
    monkeypatch.setattr(huggingface_hub.hf_api, "is_xet_available", lambda: False)
    return files


def test_the_folder_is_pushed_whole(trained, pushed):
    HfApi().upload_folder(repo_id="somebody/cats", folder_path=trained.model_folder)  # as `hf upload` does
    assert set(pushed) == MODEL | TOKENIZER | CODE | {CARD}
    assert MARK in pushed[CARD].decode()


def test_a_model_is_pushed_with_its_code(trained, pushed):
    trained.load_model().push_to_hub("somebody/cats")
    trained.load_tokenizer().push_to_hub("somebody/cats")
    assert set(pushed) == MODEL | TOKENIZER | CODE | {CARD}  # a card of transformers, where there is none yet
    assert json.loads(pushed["config.json"])["auto_map"] == AUTO_MAP
    assert pushed["model.safetensors"] == (trained.model_folder / "model.safetensors").read_bytes()


def test_a_model_is_pushed_while_it_is_saved(tiny_model, pushed, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="somebody/cats")
    assert set(pushed) == MODEL | CODE | {CARD}


# The card


def test_a_card_has_metadata_that_a_hub_reads_and_no_path(trained):
    text = (trained.model_folder / CARD).read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert "license" not in metadata and "base_model" not in metadata
    assert metadata["model-index"][0]["results"][0]["dataset"] == {"name": "held_out.txt", "type": "text"}
    assert "secret" not in text and str(trained.path.parent) not in text
    for fact in ("# cats", "3 bits for every 8 tokens", "2 layers of width 16", "`train.txt`", "4 steps of 4 rows"):
        assert fact in text, fact
    parameters = sum(each.numel() for each in trained.load_model().parameters())
    assert f"| parameters | {parameters / 1e6:.2f} M |" in text


def test_a_card_has_the_last_validation_then_the_evaluation(run, evaluated):
    last = [line for line in run.read_metrics() if line["split"] == "validation"][-1]
    assert results_of(run) == {name: round(last[name], 4) for name in ("nll", "elbo")}
    assert "bound, 4 plans" in card_of(run).text and "nats per byte" not in card_of(run).text
    values = evaluated()
    assert results_of(run) == {name: round(values[name], 4) for name in ("nll", "elbo")}
    text = card_of(run).text
    assert f"{values['nll']:.4f} ± {values['standard_errors']['nll']:.4f}" in text
    assert "bound, 3 plans" in text and "nats per byte" in text
    row = next(line for line in text.splitlines() if line.startswith("| reconstruction"))
    assert f"{values['reconstruction']:.4f}" in row and "never compare" in row
    assert f"A plan uses {values['kl']:.4f}" in text


def test_a_card_says_that_the_plan_is_not_used(run, evaluated):
    model = run.load_model()
    nn.init.zeros_(model.plan_table.weight)
    model.save_pretrained(run.model_folder)
    assert evaluated()["warning"]
    assert "**Warning:** the plan is not used" in card_of(run).text
    assert "Try:" not in card_of(run).text


def test_figures_of_fewer_steps_are_not_shown(run, evaluated):
    evaluated()
    write_json(run.control_file, {"transfer": 0.9})
    write_model_card(run)
    assert "bound, 3 plans" in card_of(run).text and "## Steering" in card_of(run).text
    further = run.settings.training.model_copy(update={"max_steps": 6})
    train(run.settings.model_copy(update={"run_dir": run.path, "training": further}), quiet=True)
    text = card_of(run).text
    assert "6 steps of 4 rows" in text and "bound, 4 plans" in text and "## Steering" not in text


@pytest.mark.parametrize("again", ["evaluate", "train"])
def test_a_text_of_your_own_stays(run, evaluated, again):
    (run.model_folder / CARD).write_text("# My cats\n")
    if again == "evaluate":
        evaluated()
    else:
        train(run.settings.model_copy(update={"run_dir": run.path}), quiet=True)
    assert (run.model_folder / CARD).read_text() == "# My cats\n"


def test_a_card_compares_and_shows_how_the_plan_steers(run, evaluated):
    model, rows = run.load_model(), run.held_out_rows(run.load_tokenizer())
    baseline = build_baseline(model.config)
    found = [evaluate_likelihood(each, rows.in_order(8), 3) for each in (model, baseline)]
    run.write_comparison(compare(*found), rows.bytes_per_token)
    values = json.loads(run.comparison_file.read_text())
    assert f"{values['difference']:+.4f} ± {values['standard_error']:.4f}" in card_of(run).text
    control = {"agreement": [0.95, 0.01], "transfer": None, "mutual_information": 1.48, "unknown": 1}
    write_json(run.control_file, control)
    write_model_card(run)
    text = card_of(run).text
    assert "| agreement | 0.9500 ± 0.0100 |" in text and "| mutual information | 1.4800 |" in text
    assert "transfer" not in text and "unknown" not in text


def test_the_card_of_a_baseline(tmp_path):
    run = train(settings(tmp_path, model={"kind": "baseline"}), quiet=True)
    text = card_of(run).text
    assert names(run.model_folder) == MODEL | TOKENIZER | {CARD}
    assert "A Llama without a plan" in text and "trust_remote_code" not in text and "bits" not in text
    assert set(results_of(run)) == {"nll"}


def test_the_card_is_of_the_best_step_where_that_is_kept(tmp_path):
    run = train(settings(tmp_path, training={"keep_best": True, "learning_rate": 0.5, "warmup_steps": 0}), quiet=True)
    lines = [line for line in run.read_metrics() if line["split"] == "validation"]
    best = min(lines, key=lambda line: line["loss"])
    assert results_of(run)["elbo"] == round(best["elbo"], 4)
    assert f"{best['step']} steps of" in card_of(run).text


@pytest.mark.parametrize(
    ("pretrained", "base_model", "shown"),
    [("some/llama", "some/llama", "some/llama"), ("{folder}/secret", None, "secret"), (None, None, None)],
)
def test_a_card_names_what_the_run_started_from(run, tmp_path, pretrained, base_model, shown):
    (tmp_path / "secret").mkdir()
    run.settings.model.pretrained = pretrained and pretrained.format(folder=tmp_path)
    write_model_card(run)
    assert card_of(run).data.base_model == base_model
    text = (run.model_folder / CARD).read_text()
    assert (f"It started from {shown}." in text) == (shown is not None)
    assert str(tmp_path) not in text
