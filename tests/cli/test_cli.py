"""The command line itself: help, usage and errors."""

import errno
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cli_cases import TEXT, assert_refused, everything_below, tiny_settings
from cli_fixtures import *  # noqa: F403

import free_transformer
from free_transformer.cli.exit_status import as_command
from free_transformer.cli.main import app, main
from free_transformer.errors import DataError, InputError, MissingDependency, RunError, SettingsError
from free_transformer.files import write_text
from free_transformer.settings import Settings, common_settings, describe_settings

GROUP = typer.main.get_command(app).commands
COMMANDS = {name: command for name, command in GROUP.items() if not hasattr(command, "commands")}
COMMANDS |= {f"reproduce {name}": command for name, command in GROUP["reproduce"].commands.items()}
EXAMPLES = [
    example
    for command in COMMANDS.values()
    for example in re.findall(r"- `(free-transformer .*?)`", command.callback.__doc__, flags=re.S)
]
RUN_HERE = "free-transformer (train|evaluate|compare|plan|report|tokenizer|watch|generate (?!.*--plan ))"  # in seconds


OF_RUNS = ["evaluate", "generate", "plan", "report", "watch", "compare", "export", "serve", "lm-eval"]


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_folder_that_is_no_run_is_refused_and_stays_empty(command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.txt").write_text("text")
    options = {"compare": ["empty"], "lm-eval": ["--tasks", "x"], "serve": ["--port", 0]}.get(name, [])
    for folder, problem in [
        ("empty", "it has no config.yaml"),
        ("file.txt", "a file, not a folder"),
        ("nowhere", "no such folder"),
    ]:
        assert_refused(
            command(name, folder, *options),
            2,
            rf"{folder}: .*{problem}\)?; give a folder created by `free-transformer train`",
        )
    assert everything_below(tmp_path).keys() == {tmp_path / "file.txt"} and not any(Path("empty").iterdir())


def test_a_folder_of_runs_names_them(command, runs):
    assert_refused(
        command("evaluate", runs["free"].parent), 2, f"it contains {runs['baseline']}, {runs['free']}: choose"
    )


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("empty", r"not a model \(it has no config.json\); name a folder"),
        ("file.txt", "a file, not a folder; name a folder"),
        ("nowhere", "cannot be read as a model .*; name a folder"),
    ],
)
def test_convert_refuses_what_is_no_model(command, tmp_path, monkeypatch, source, problem):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.txt").write_text("text")
    assert_refused(command("convert", source, "out"), 2, f"{source}: {problem}")


def test_version(command):
    outcome = command("--version")
    assert (outcome.status, outcome.out) == (0, f"free-transformer {free_transformer.__version__}\n")


@pytest.mark.parametrize(("given", "meant"), [(["evalute", "x"], "evaluate"), (["reproduce", "leters"], "letters")])
def test_an_unknown_command_names_the_nearest(command, given, meant):
    assert_refused(command(*given), 2, f"Did you mean '{meant}'")


@pytest.mark.parametrize("arguments", [["evaluate", "--nonsense"], ["nonsense"], ["evaluate"], ["generate", "x", "y"]])
def test_a_command_line_that_is_not_understood_is_one_line_and_status_2(command, arguments):
    assert_refused(command(*arguments), 2, "")


@pytest.mark.parametrize(
    ("arguments", "error"), [(["report", "nowhere"], ValueError), (["train", "nowhere.yaml"], ValueError)]
)
def test_debug_shows_the_error_where_it_arose(monkeypatch, tmp_path, arguments, error):
    monkeypatch.chdir(tmp_path)
    for argv in (["--debug", *arguments], [*arguments, "--debug"]):
        monkeypatch.setattr(sys, "argv", ["free-transformer", *argv])
        with pytest.raises(error, match="nowhere"):
            main()


def test_help_of_train_explains_every_setting_by_section_after_the_common_ones(command):
    outcome = command("train", "--help")
    assert outcome.status == 0
    titles = re.findall(r"─ (Arguments|Options|Common settings|Settings: \w+)", outcome.out)
    assert titles == ["Arguments", "Options", "Common settings", *(f"Settings: {name}" for name in describe_settings())]
    common = outcome.out.partition("Common settings")[2].partition("Settings: run")[0]
    assert re.findall(r"^│ ([\w.]+) = ", common, flags=re.M) == [each.name for each in common_settings()]
    shown = " ".join(outcome.out.split())
    for name, section in Settings.model_fields.items():
        for key in getattr(section.annotation, "model_fields", {}):
            assert f"{name}.{key} = " in shown, f"{name}.{key}"
    assert "run_dir = " in shown
    assert "KL in bits per plan that is not penalized" in shown


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "generate", "report", "tokenizer"])
def test_every_command_has_help(command, name):
    assert name in command("--help").out
    outcome = command(name, "--help")
    assert (outcome.status, outcome.err) == (0, "")


def test_no_command_shows_the_help(command):
    outcome = command()
    assert "evaluate" in outcome.out + outcome.err


@pytest.fixture(scope="module")
def examples_folder(runs, tmp_path_factory) -> Path:
    """The files and runs that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    for kind, name in (("free", "my-run"), ("baseline", "my-run-baseline"), ("free", "a"), ("baseline", "b")):
        shutil.copytree(runs[kind], folder / "runs" / name)
    for name in ("texts/a.txt", "held_out/a.txt", "corpus.txt", "other.txt", "example.txt"):
        write_text(folder / name, TEXT)
    settings = tiny_settings(folder, "free").model_copy(deep=True)
    settings.training.max_steps = 2
    settings.data.train = settings.data.validation = [str(folder / "corpus.txt")]
    write_text(folder / "config.yaml", settings.to_yaml())
    return folder


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("x=1: at least 2"), 2, "x=1: at least 2"),
        (SettingsError("x=1: at least 2"), 2, "x=1: at least 2"),
        (DataError("a.txt: contains no text"), 2, "a.txt: contains no text"),
        (RunError("the run\nfailed"), 1, "the run failed"),
        (MissingDependency("pip install it"), 1, "pip install it"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 1, "a.txt: Permission denied"),
        (
            OutOfMemoryError("2 GiB are missing"),
            1,
            "out of memory; use a smaller batch (2 GiB are missing)",
        ),
    ],
)
def test_errors_that_a_person_can_act_on_are_one_line(capsys, error, status, message):
    with pytest.raises(SystemExit) as stop, as_command():
        raise error
    assert stop.value.code == status
    assert capsys.readouterr().err == f"free-transformer: error: {message}\n"
    with pytest.raises(type(error)), as_command(debug=True):
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RuntimeError("x"), OSError("x"), ImportError("x"), KeyError("x"), AssertionError("x")],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_the_library_keep_their_traceback(capsys, error):
    with pytest.raises(type(error)), as_command():
        raise error
    assert capsys.readouterr().err == ""


def test_a_fault_is_a_traceback_and_status_1():
    code = (
        "from free_transformer.cli.exit_status import as_command\nwith as_command():\n    raise RuntimeError('a fault')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: a fault" in done.stderr


def test_help_does_not_import_torch():
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    code = (
        "import sys\nfrom free_transformer.cli.main import app\n"
        f"for name in {names}:\n"
        "    if name != 'train':  # describes the settings\n"
        "        app([name, '--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_option_and_every_command_is_explained():
    for name, command in COMMANDS.items():
        sentence, *_, title, examples = inspect.cleandoc(command.callback.__doc__).split("\n\n")
        assert sentence[0].isupper() and sentence.endswith(".") and title == "Examples:"
        assert all(line.startswith(f"- `free-transformer {name} ") for line in examples.splitlines())
        for parameter in command.params:
            words = getattr(parameter, "help", None)
            assert words and words[0].isupper() and words.endswith("."), f"{name} {parameter.name}: {words}"


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_help_is_understood(example):
    _, name, *arguments = shlex.split(example)
    if name == "reproduce":
        name = f"{name} {arguments.pop(0)}"
    COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("example", [each for each in EXAMPLES if re.match(RUN_HERE, each)])
def test_quick_examples_of_the_help_run_one_after_the_other(command, examples_folder, monkeypatch, example):
    monkeypatch.chdir(examples_folder)
    outcome = command(*shlex.split(example)[1:])
    assert outcome.status == 0, outcome
