"""Runs that are killed, stopped or run out of disk, in separate processes."""

import errno
import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import processes
from free_transformer.training import Run
from free_transformer.training.checkpoint import Checkpoints, list_checkpoints
from processes import start, tiny_values, train_tiny, untimed


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def newest_step(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)), default=0)


def wait_for(process, happens, *arguments) -> None:
    while process.is_alive() and not happens(*arguments):
        time.sleep(0.001)


def has_step_after(folder: Path, step: int) -> bool:
    return newest_step(folder) > step


@pytest.mark.parametrize(("kills", "background"), [pytest.param(30, False, marks=pytest.mark.slow), (10, True)])
def test_a_repeatedly_killed_run_ends_as_an_uninterrupted_one(tmp_path, kills, background):
    """Every other time while a checkpoint is being written, else at any moment."""
    sections = {"model": {"dropout": 0.2}, "logging": {"sample_every": 0}}
    training = {"max_steps": 6 * kills, "save_every": 1, "eval_every": 40, "async_save": background}
    values = [tiny_values(tmp_path, name, training=training, **sections) for name in ("whole", "killed")]
    processes.run(1, train_tiny, values[0], log=tmp_path / "whole.log")
    folder = tmp_path / "killed" / "checkpoints"
    moments = random.Random(0)
    killed, while_writing, newest = 0, 0, 0
    for kill in range(kills):
        (process,) = start(1, train_tiny, values[1], log=tmp_path / "killed.log")
        wait_for(process, has_step_after, folder, newest)
        if kill % 2:
            time.sleep(moments.uniform(0, 0.03))
        else:
            wait_for(process, lambda: any(folder.glob(".tmp-*")))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        while_writing += any(folder.glob(".tmp-*"))
        assert newest_step(folder) > newest  # nothing that was complete is lost
        newest = newest_step(folder)
    assert killed == kills
    assert while_writing > 0
    processes.run(1, train_tiny, values[1], log=tmp_path / "killed.log")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    assert not any(folder.glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_says_so_in_one_line(tmp_path, number):
    training = {"max_steps": 100_000, "save_every": 0, "eval_every": 0}
    values = tiny_values(tmp_path, "run", training=training, logging={"sample_every": 0})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup, which a run obeys")
    (process,) = start(1, processes.command, "train", str(config), "data.workers=1", log=tmp_path / "log")
    try:
        wait_for(process, lambda: len(untimed(tmp_path / "run")) > 3)
        os.kill(process.pid, number)
        process.join(processes.SECONDS)
        assert process.exitcode == 128 + number
    finally:
        process.kill()
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]  # some releases of rich add an empty line
    step = newest_step(tmp_path / "run" / "checkpoints")
    assert last.startswith(f"stopped by {signal.Signals(number).name} at step {step}, saved in ")
    told = (tmp_path / "log").read_text()
    assert f"{signal.Signals(number).name}: the run saves its state and ends after this step" in told
    assert "Traceback" not in told
    assert [line["step"] for line in untimed(tmp_path / "run")] == list(range(1, step + 1))


ROOM = 12_000  # bytes: more than a log has, less than a checkpoint


def train_on_a_small_disk(values: dict, from_step: int) -> None:
    """A run whose checkpoints and metrics may not grow any more from a step on; what it says has room."""
    save = Checkpoints.save
    run = Run(values["run_dir"])

    def save_in_little_room(self, state, best=None):
        if state.step >= from_step:
            run.append_metrics(step=0, split="padding", text="-" * ROOM)
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
        return save(self, state, best)

    Checkpoints.save = save_in_little_room
    train_tiny(values)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_is_one_line_and_the_checkpoints_before_it_stay(tmp_path, count, background):
    sections = {"training": {"max_steps": 8, "async_save": background}, "distributed": {"fsdp": True, "timeout": 20}}
    values = tiny_values(tmp_path, "run", **sections)
    codes = processes.finish(start(count, train_on_a_small_disk, values, 6, log=tmp_path / "log"))
    assert codes == [1] * count
    told = (tmp_path / "log").read_text()
    too_large = os.strerror(errno.EFBIG)
    what = r"metrics\.jsonl" if background else r"step-6: the checkpoint cannot be written"
    assert re.search(rf"error.*({what}.*{too_large}|{too_large}.*{what})", told)
    assert "Traceback" not in told
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-2", "step-4"]
    processes.run(1, train_tiny, values, log=tmp_path / "log")
    assert "resumed at step 4" in (tmp_path / "log").read_text()
