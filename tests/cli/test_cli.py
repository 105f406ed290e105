"""The command line itself: help, usage and errors."""

import errno
import inspect
import subprocess
import sys

import pytest
import typer
from cli_cases import assert_refused
from cli_fixtures import *  # noqa: F403

from free_transformer.cli.exit_status import as_command
from free_transformer.cli.main import app, main
from free_transformer.errors import DataError, InputError, MissingDependency, RunError, SettingsError
from free_transformer.settings import Settings


@pytest.mark.parametrize("name", ["evaluate", "generate", "report", "compare"])
def test_a_folder_that_is_no_run_is_refused_and_stays_empty(command, tmp_path, name):
    folders = [tmp_path / "empty", *([tmp_path / "empty"] if name == "compare" else [])]
    folders[0].mkdir()
    assert_refused(command(name, *folders), 2, "empty: not a run")
    assert not list(folders[0].iterdir())


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


def test_help_of_train_explains_every_setting(command):
    outcome = command("train", "--help")
    assert outcome.status == 0
    shown = " ".join(outcome.out.split())
    for name, section in Settings.model_fields.items():
        for key in getattr(section.annotation, "model_fields", {}):
            assert f"{name}.{key} = " in shown, f"{name}.{key}"
    assert "run_dir = " in shown
    assert "KL in bits per plan that costs nothing" in shown


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "generate", "report", "tokenizer"])
def test_every_command_has_help(command, name):
    assert name in command("--help").out
    outcome = command(name, "--help")
    assert (outcome.status, outcome.err) == (0, "")


def test_no_command_shows_the_help(command):
    outcome = command()
    assert "evaluate" in outcome.out + outcome.err


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
    for command in app.registered_commands:
        sentence, title, examples = inspect.cleandoc(command.callback.__doc__).split("\n\n")
        assert sentence[0].isupper() and sentence.endswith(".") and title == "Examples:"
        assert all(line.startswith("- `free-transformer ") for line in examples.splitlines())
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        for parameter in command.params:
            words = getattr(parameter, "help", None)
            assert words and words[0].isupper() and words.endswith("."), f"{name} {parameter.name}: {words}"
