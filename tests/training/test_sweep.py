import json
import math
import string
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from free_transformer.cli.main import main
from free_transformer.files import write_text
from free_transformer.runs import evaluate
from free_transformer.training import Run, SettingsError, loop, sweep, train
from free_transformer.training.checkpoint import CheckpointFailed
from free_transformer.training.loop import TrainingFailed
from free_transformer.training.signals import TrainingStopped
from free_transformer.training.sweep import load_sweep, parse_grid, run_sweep
from free_transformer.training.sweep_summary import (
    Sweep,
    confidence_interval,
    sweep_groups,
    sweep_table,
    write_sweep_report,
)
from processes import SENTENCES

GRID = ["model.latent_dim=2,3", "training.seed=0,1"]
NAMES = ["latent_dim=2,seed=0", "latent_dim=2,seed=1", "latent_dim=3,seed=0", "latent_dim=3,seed=1"]
T_TABLE = {2: 12.7062, 3: 4.3027, 5: 2.7764, 11: 2.2281, 31: 2.0423}  # 97.5 % points by number of values
TEXTS = st.text(string.ascii_letters + string.digits + " ,:'\"[]{}#/\\._-=éß", min_size=1, max_size=12).filter(
    lambda text: text != "auto"
)  # which is another tokenizer
NESTED = st.recursive(st.integers(), lambda each: st.lists(each) | st.dictionaries(TEXTS, each), max_leaves=5)


def write_config(folder: Path) -> Path:
    """Settings of runs of a second, in `folder / "sweep"`."""
    text, short = folder / "text.txt", folder / "short.txt"
    text.write_text("".join(SENTENCES[i % 4] for i in range(40)))
    short.write_text("".join(SENTENCES))
    settings = {
        "run_dir": str(folder / "sweep"),
        "model": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "latent_dim": 3, "free_bits": 0.25},
        "training": {"max_steps": 4, "batch_size": 4, "seq_len": 16, "warmup_steps": 2, "log_every": 1}
        | {"learning_rate": 3e-3, "save_every": 2, "eval_every": 0, "prior_rows": 4, "device": "cpu"},
        "data": {"train": [str(text)], "validation": [str(short)]},
        "logging": {"tensorboard": False, "sample_every": 0, "sample_tokens": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def shared_config(tmp_path_factory) -> Path:
    """For sweeps that are loaded but not run."""
    return write_config(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Sweep:
    """An uninterrupted sweep of two groups of two seeds, for reading only."""
    finished = load_sweep(write_config(tmp_path_factory.mktemp("finished")), GRID)
    run_sweep(finished, quiet=True)
    return finished


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the runs that `train` is called for."""
    names: list[str] = []

    def counting(settings, quiet):
        names.append(settings.run_dir.name)
        return train(settings, quiet)

    monkeypatch.setattr(sweep, "train", counting)
    return names


def summary(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def everything_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(message: str):
    return pytest.raises(SettingsError, match=message)


def made_up(grid: list[str], figures: dict[str, dict[str, float]], config: Path) -> Sweep:
    """A sweep whose runs have these figures by their folder's name; the others have failed."""
    made = load_sweep(config, grid)
    for run in made.runs:
        run.status, run.figures = ("done", figures[run.name]) if run.name in figures else ("failed", {})
    return made


@given(st.dictionaries(st.from_regex(r"[a-z]+\.[a-z_]+", fullmatch=True), st.lists(TEXTS, min_size=1, unique=True)))
def test_a_grid_is_read_as_it_was_written(values):
    quoted = {name: [f"'{text.replace(chr(39), chr(39) * 2)}'" for text in texts] for name, texts in values.items()}
    grid = parse_grid([f"{name}={','.join(texts)}" for name, texts in quoted.items()])
    assert list(grid.items()) == list(quoted.items())
    assert {name: [yaml.safe_load(text) for text in texts] for name, texts in grid.items()} == values


@given(st.lists(NESTED, max_size=4))
def test_commas_in_brackets_and_braces_belong_to_their_value(values):
    texts = [yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0] for value in values]
    texts = list(dict.fromkeys(texts)) or ["null"]
    assert parse_grid([f"x.y={','.join(texts)}"]) == {"x.y": texts}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8, 16", ["8", "16"]),
        ("1e-3,0.5", ["1e-3", "0.5"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("it's,letters:40:1", ["it's", "letters:40:1"]),
        ("a=b", ["a=b"]),
    ],
)
def test_values_stay_text(text, values):
    assert parse_grid([f"data.train={text}"]) == {"data.train": values}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["model.latent_dim"], r"'model.latent_dim': .* such as model.latent_dim=8,16"),
        (["=1,2"], "'=1,2': the grid needs"),
        (["model.latent_dim="], "'model.latent_dim=': a value is empty"),
        (["model.latent_dim=8,"], "'model.latent_dim=8,': a value is empty"),
        (["model.latent_dim=8,,9"], "'model.latent_dim=8,,9': not comma-separated YAML values .*is a value empty"),
        (["data.train=[a,b"], "'data.train=.a,b': not comma-separated YAML values .* bracket or quote not closed"),
        (["data.train='a,b"], "data.train='a,b.*: not comma-separated YAML values"),
        (["model.latent_dim=8,9,8"], "'model.latent_dim=8,9,8': 8 appears twice"),
        (
            ["training.seed=0", "training.seed=1"],
            "training.seed: appears twice in the grid; give all its values at once",
        ),
        (["run_dir=a,b"], "run_dir=a,b: a sweep has a single folder with a subfolder per run; give one"),
    ],
)
def test_a_grid_that_cannot_be_read_is_refused_in_one_line(grid, message):
    with refused(message) as error:
        parse_grid(grid)
    assert "\n" not in str(error.value)


def test_runs_are_all_combinations_with_folders_that_say_what_varies(shared_config):
    found = load_sweep(shared_config, ["model.latent_dim=2,3", "training.max_steps=7", "training.seed=0,1"])
    assert found.varied == ["model.latent_dim", "training.seed"]
    assert found.folder == shared_config.parent / "sweep"
    assert [run.name for run in found.runs] == NAMES
    for run, (bits, seed) in zip(found.runs, product((2, 3), (0, 1)), strict=True):
        settings = run.settings
        assert (settings.model.latent_dim, settings.training.seed, settings.training.max_steps) == (bits, seed, 7)
        assert settings.run_dir == found.folder / run.name
        assert run.status == "waiting"


def test_a_single_run_dir_is_the_folder_of_the_sweep(shared_config, tmp_path):
    found = load_sweep(shared_config, [f"run_dir={tmp_path}/new", "training.seed=0,1"])
    assert found.folder == tmp_path / "new"
    assert [run.settings.run_dir for run in found.runs] == [tmp_path / "new/seed=0", tmp_path / "new/seed=1"]


def test_nothing_that_varies_is_a_sweep_of_one_run(shared_config):
    for grid in ([], ["training.seed=3"]):
        assert [run.name for run in load_sweep(shared_config, grid).runs] == ["run"]


def test_names_that_two_sections_share_keep_their_section(shared_config):
    grid = ["model.rope_theta=1,2", "model.rope_parameters.rope_theta=3,4", "training.seed=0,1"]
    found = load_sweep(shared_config, grid)
    assert found.runs[0].name == "model.rope_parameters.rope_theta=3,model.rope_theta=1,seed=0"
    assert sweep_table(found).header == ["model.rope_theta", "model.rope_parameters.rope_theta", "runs"]


@given(st.lists(TEXTS | st.text("a/_", min_size=90, max_size=200), min_size=2, max_size=6, unique=True))
def test_folders_are_short_safe_unique_and_stay_when_the_grid_grows(shared_config, texts):
    values = [json.dumps(text, ensure_ascii=False) for text in texts]
    found = load_sweep(shared_config, [f"data.tokenizer={','.join(values)}"])
    names = [run.name for run in found.runs]
    assert [run.settings.data.tokenizer for run in found.runs] == texts
    assert len(set(names)) == len(texts)
    for run in found.runs:
        assert run.settings.run_dir.parent == found.folder
        assert set(run.name) <= set(string.ascii_letters + string.digits + "._=,+-")
        assert len(run.name) <= 110
    if len(values) > 2:
        fewer = load_sweep(shared_config, [f"data.tokenizer={','.join(values[1:])}"])
        assert [run.name for run in fewer.runs] == names[1:]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["training.max_steps=4,0"], "training.max_steps=0: .* greater than or equal to 1"),
        (["model.latent_dims=4,5"], "unknown setting '.*latent_dims': did you mean 'latent_dim'"),
        (["model.num_heads=2,3", "training.seed=0,1"], "model: "),
        (["training.learning_rate=1e-3,0.001"], "rate=1e-3 and learning_rate=0.001 have the same settings"),
    ],
)
def test_a_bad_value_anywhere_is_told_before_anything_is_trained(config, grid, message):
    with refused(message) as error:
        load_sweep(config, grid)
    assert "\n" not in str(error.value)
    assert not (config.parent / "sweep").exists()


def test_a_sweep_needs_a_folder_of_its_own_and_one_process(config, tmp_path, monkeypatch):
    write_text(tmp_path / "sweep" / "config.yaml", config.read_text())
    with refused("sweep is the folder of a run; choose another folder, such as run_dir=.*sweep-sweep"):
        load_sweep(config, GRID)
    for name in ("sweep.json", "report.html"):
        write_text(tmp_path / name / name, "mine")
        with refused(f"{name}, not written by a sweep, which would be replaced"):
            load_sweep(config, [*GRID, f"run_dir={tmp_path / name}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("start it without torchrun"):
        load_sweep(config, [*GRID, "run_dir=other"])


def test_intervals_that_could_not_be_computed_are_told_before_anything_is_trained(shared_config, monkeypatch):
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    load_sweep(shared_config, ["model.latent_dim=2,3"])
    with refused("pip install scipy"):
        load_sweep(shared_config, GRID)


def test_a_finished_sweep_leaves_its_runs_a_summary_and_a_report(finished, outside_references):
    found = {path.name for path in finished.folder.iterdir() if not path.name.startswith(".")}
    assert found == {*NAMES, "sweep.json", "report.html"}
    assert [(run.status, run.reason) for run in finished.runs] == [("done", None)] * 4 and not finished.failed
    values = summary(finished.folder)
    assert [run["folder"] for run in values["runs"]] == NAMES
    assert values["runs"][1]["overrides"] == {"model.latent_dim": "2", "training.seed": "1"}
    for run in values["runs"]:
        likelihood = json.loads((finished.folder / run["folder"] / "metrics.json").read_text())
        assert {name: run["figures"][name] for name in ("nll", "elbo", "kl", "gap")}.items() <= likelihood.items()
        assert run["figures"]["live_bits"] == likelihood["usage"]["live_bits"]
    page = (finished.folder / "report.html").read_text()
    assert all(name in page for name in NAMES) and "<svg" in page
    assert not outside_references(page)


def test_runs_are_evaluated_as_the_command_does(finished, tmp_path, monkeypatch):
    run = Run(finished.runs[0].settings.run_dir)
    before = run.evaluation_file.read_bytes()
    monkeypatch.setattr(sys, "argv", ["free-transformer", "evaluate", str(run.path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert run.evaluation_file.read_bytes() == before


def test_a_run_of_a_sweep_is_the_run_that_train_makes(finished, config):
    settings = finished.runs[3].settings.model_copy(update={"run_dir": config.parent / "alone"})
    ours, theirs = Run(finished.runs[3].settings.run_dir), train(settings, quiet=True)
    for name, tensor in ours.load_model().state_dict().items():
        assert torch.equal(tensor, theirs.load_model().state_dict()[name]), name


def test_a_finished_sweep_is_not_trained_again(finished, trained):
    before = everything_below(finished.folder)
    again = load_sweep(finished.folder.parent / "config.yaml", GRID)
    assert [run.status for run in again.runs] == ["done"] * 4
    run_sweep(again, quiet=True)
    assert trained == []
    after = everything_below(finished.folder)
    changed = {path.name for path in before if before[path] != after[path]}
    assert before.keys() == after.keys() and changed <= {"report.html"}  # matplotlib adds its own names


def stop_training(monkeypatch) -> None:
    """In the middle of the second run."""
    original, steps = loop._Trainer._optimizer_step, []

    def optimizer_step(self, *arguments):
        steps.append(self.state.step)
        if len(steps) == 4 + 3:
            raise TrainingStopped(2)
        return original(self, *arguments)

    monkeypatch.setattr(loop._Trainer, "_optimizer_step", optimizer_step)


def stop_evaluation(monkeypatch) -> None:
    original, calls = evaluate.evaluate_likelihood, []

    def evaluate_likelihood(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(evaluate, "evaluate_likelihood", evaluate_likelihood)


def stop_summary(monkeypatch) -> None:
    """Where the second run is done and the summary does not know it."""
    original, calls = sweep.write_summary, []

    def write_summary(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(sweep, "write_summary", write_summary)


@pytest.mark.parametrize(
    ("stop", "again"), [(stop_training, NAMES[1:]), (stop_evaluation, NAMES[1:]), (stop_summary, NAMES[2:])]
)
def test_a_stopped_sweep_resumes_with_the_same_result(finished, config, trained, monkeypatch, stop, again):
    with monkeypatch.context() as patch, pytest.raises((TrainingStopped, KeyboardInterrupt)):
        stop(patch)
        run_sweep(load_sweep(config, GRID), quiet=True)
    folder = config.parent / "sweep"
    assert [run["status"] for run in summary(folder)["runs"]] == ["done", "waiting", "waiting", "waiting"]
    assert trained == NAMES[:2]
    resumed = load_sweep(config, GRID)
    assert [run.status for run in resumed.runs].count("done") == 4 - len(again)
    run_sweep(resumed, quiet=True)
    assert trained[2:] == again
    assert summary(folder) == summary(finished.folder)
    steps = [line["step"] for line in Run(folder / NAMES[1]).read_metrics() if line["split"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_more_steps_resume_and_are_evaluated_again(config, trained):
    short = load_sweep(config, [])
    run_sweep(short, quiet=True)
    longer = load_sweep(config, ["training.max_steps=6"])
    assert longer.runs[0].status == "waiting"
    run_sweep(longer, quiet=True)
    assert trained == ["run", "run"]
    assert longer.runs[0].figures["nll"] != short.runs[0].figures["nll"]
    metrics = Run(longer.folder / "run").read_metrics()
    assert [line["step"] for line in metrics if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("override", ["training.max_steps=2", "training.learning_rate=1e-4", "model.hidden_dim=32"])
def test_folders_of_other_settings_are_refused_and_left_alone(finished, override):
    before = everything_below(finished.folder)
    name = override.partition("=")[0]
    with refused(f"latent_dim=2,seed=0: was trained with {name}=.*, not .*; choose another run_dir") as error:
        load_sweep(finished.folder.parent / "config.yaml", [*GRID, override])
    assert "\n" not in str(error.value)
    assert everything_below(finished.folder) == before


def test_settings_that_change_no_result_may_change(finished):
    harmless = ["training.save_every=3", "training.log_every=2", "logging.sample_tokens=5", "training.device=auto"]
    again = load_sweep(finished.folder.parent / "config.yaml", [*GRID, *harmless])
    assert [run.status for run in again.runs] == ["done"] * 4


def test_a_larger_grid_in_another_order_keeps_what_is_done(finished):
    larger = load_sweep(finished.folder.parent / "config.yaml", ["training.seed=2,1,0", "model.latent_dim=4,3,2"])
    assert sorted(run.name for run in larger.runs if run.status == "done") == NAMES
    assert larger.varied == ["training.seed", "model.latent_dim"]


def test_runs_that_fail_leave_the_others_alone_and_are_tried_again(config, monkeypatch):
    errors = [TrainingFailed("the loss is nan"), CheckpointFailed("disk full"), torch.OutOfMemoryError("no\nroom")]
    calls = []

    def failing(settings, quiet):
        calls.append(settings.run_dir.name)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return train(settings, quiet)

    monkeypatch.setattr(sweep, "train", failing)
    grid = ["training.seed=0,1,2,3", "training.max_steps=2"]
    found = load_sweep(config, grid)
    run_sweep(found, quiet=True)
    reasons = ["the loss is nan", "disk full", "no"]
    assert [(run.name, run.reason) for run in found.failed] == list(zip(calls, reasons, strict=False))
    values = summary(found.folder)
    assert [(run["status"], run["reason"]) for run in values["runs"]][1:] == [
        *product(["failed"], reasons[1:]),
        ("done", None),
    ]
    assert (values["groups"][0]["runs"], values["groups"][0]["done"], values["groups"][0]["failed"]) == (4, 1, 3)
    assert sweep_table(found).rows[0][0] == "1 of 4, 3 failed"
    page = (found.folder / "report.html").read_text()
    assert all(reason in page for reason in reasons)
    again = load_sweep(config, grid)
    run_sweep(again, quiet=True)
    assert calls[4:] == ["seed=0", "seed=1", "seed=2"] and not again.failed


def test_settings_that_the_data_refuse_fail_one_run(config, capsys):
    found = load_sweep(config, ["training.batch_size=1000,4", "training.max_steps=1"])
    run_sweep(found)
    assert [run.status for run in found.runs] == ["failed", "done"]
    assert "fewer than batch_size=1000" in found.runs[0].reason
    shown = capsys.readouterr().err
    assert "run 1 of 2, batch_size=1000" in shown and "batch_size=1000 failed: the training text" in shown


def test_a_held_out_loss_that_is_no_number_is_a_failure(config, monkeypatch):
    original = evaluate.evaluate_likelihood

    def evaluate_likelihood(*arguments):
        result = original(*arguments)
        result.nll = math.nan
        return result

    monkeypatch.setattr(evaluate, "evaluate_likelihood", evaluate_likelihood)
    found = load_sweep(config, ["training.max_steps=1"])
    run_sweep(found, quiet=True)
    assert found.runs[0].reason == "the NLL of the held-out text is nan"


def test_without_held_out_text_the_table_has_only_training(config, trained):
    grid = ["data.validation=[]", "training.max_steps=2", "model.latent_dim=2,3"]
    found = load_sweep(config, grid)
    run_sweep(found, quiet=True)
    table = sweep_table(found)
    header, rows = table.header, table.rows
    assert header == ["latent_dim", "runs", "training loss, nats per token", "training KL, bits per plan"]
    assert not any("best" in cell for row in rows for cell in row)  # a training loss is nothing to choose by
    last = [line for line in Run(found.runs[0].settings.run_dir).read_metrics() if line["split"] == "train"][-1]
    assert rows[0] == ["2", "1", f"{last['loss']:.4f}", f"{last['kl']:.2f}"]
    assert not Run(found.runs[0].settings.run_dir).evaluation_file.exists()
    run_sweep(load_sweep(config, grid), quiet=True)
    assert len(trained) == 2


def test_baselines_have_only_an_nll(config):
    found = load_sweep(config, ["model.kind=free,baseline", "training.max_steps=2"])
    run_sweep(found, quiet=True)
    table = sweep_table(found)
    header, (free, baseline) = table.header, table.rows
    assert header[:3] == ["kind", "runs", "nll, nats per token"]
    assert baseline[3:] == ["-"] * 4 and "-" not in free and baseline[2] != "-"


@pytest.mark.parametrize("count", T_TABLE)
def test_intervals_are_those_of_a_table_of_students_t(count):
    values = np.random.default_rng(count).normal(3, 2, count)
    found = confidence_interval(values.tolist())
    assert found.mean == pytest.approx(values.mean())
    assert found.half_width == pytest.approx(T_TABLE[count] * values.std(ddof=1) / count**0.5, rel=1e-4)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_intervals_are_scipys(values):
    from scipy import stats

    found = confidence_interval(values)
    if (error := stats.sem(values)) > 1e-6:
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
        assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(expected)


def test_groups_differ_in_more_than_their_seed_and_the_best_is_marked(shared_config):
    nll = dict(zip(NAMES, (1.0, 2.0, 1.5, 1.3), strict=True))
    made = made_up(GRID, {name: {"nll": value, "live_bits": 1} for name, value in nll.items()}, shared_config)
    groups = sweep_groups(made)
    assert [group.overrides for group in groups] == [{"model.latent_dim": "2"}, {"model.latent_dim": "3"}]
    assert [group.figures["nll"].mean for group in groups] == pytest.approx([1.5, 1.4])
    assert [group.best for group in groups] == [False, True]
    table = sweep_table(made)
    header, rows = table.header, table.rows
    assert header == ["latent_dim", "runs", "nll, nats per token", "live bits"]
    assert rows == [
        ["2", "2", f"1.5000 ± {12.7062 * 0.5:.4f}", "1.0 ± 0.0"],
        ["3", "2", f"1.4000 ± {12.7062 * 0.1:.4f} (best)", "1.0 ± 0.0"],
    ]


def test_a_single_seed_has_no_interval(shared_config):
    made = made_up(["model.latent_dim=2,3"], {"latent_dim=2": {"nll": 1.25}, "latent_dim=3": {"nll": 2}}, shared_config)
    assert sweep_table(made).rows == [["2", "1", "1.2500 (best)"], ["3", "1", "2.0000"]]
    assert [group.figures["nll"].half_width for group in sweep_groups(made)] == [None, None]


def test_a_group_without_figures_is_shown_and_not_the_best(shared_config):
    made = made_up(GRID, {NAMES[0]: {"nll": 3.0}, NAMES[1]: {"nll": 3.5}}, shared_config)
    assert sweep_table(made).rows[1] == ["3", "0 of 2, 2 failed", "-"]
    assert not any(group.best for group in sweep_groups(made))  # with nothing to be better than


@pytest.mark.parametrize("varied", ["data.tokenizer=bytes,other", "training.seq_len=8,16", "data.validation=a,b"])
def test_none_is_the_best_where_the_text_itself_varies(shared_config, varied):
    made = load_sweep(shared_config, [varied])
    for number, run in enumerate(made.runs):
        run.status, run.figures = "done", {"nll": float(number)}
    assert not any(group.best for group in sweep_groups(made))


def test_a_report_does_without_matplotlib(config, monkeypatch):
    made = load_sweep(config, ["training.seed=0,1"])
    for run in made.runs:
        line = {"step": 1, "split": "train", "loss": 1.0, "reconstruction": 1.0}
        write_text(Run(run.settings.run_dir).metrics_file, json.dumps(line) + "\n")
    assert "<svg" in write_sweep_report(made).read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = write_sweep_report(made).read_text()
    assert "Plots need matplotlib" in page and "seed=1" in page and "<svg" not in page
