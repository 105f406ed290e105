"""Runs of several processes against the same run of one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing import assert_close

import processes
from free_transformer.distributed.processes import Processes, _data_processes, join_processes
from free_transformer.model.layers import DecoderLayer
from free_transformer.settings import DistributedSettings, parse_settings
from free_transformer.training import SettingsError, checkpoint, train
from free_transformer.training.checkpoint import list_checkpoints
from free_transformer.training.loop import _Trainer
from free_transformer.training.optimizers import SharedMuon
from free_transformer.training.signals import StopRequest
from processes import command, free_port, start, tiny_values, train_tiny, untimed

ROOT = Path(__file__).parents[2]
TIED = {"tie_embeddings": True, "aggregate_weight": 1.0, "min_bits": 0.2}
WAYS = {
    "fsdp": (2, {"fsdp": True}, {}),
    "fsdp of 3, tied": (3, {"fsdp": True}, TIED),
    "fsdp of a baseline": (2, {"fsdp": True}, {"kind": "baseline"}),
    "ddp": (2, {}, {"plan_span": 1, "aggregate_weight": 0.5}),
    "tensor": (2, {"tensor": 2}, TIED),
    "hybrid": (4, {"fsdp": True, "replicas": 2}, {}),
    "data x tensor": (4, {"data": 2, "tensor": 2}, {}),
    "fsdp, muon": (3, {"fsdp": True}, {}),
    "fsdp x tensor, muon": (4, {"fsdp": True, "tensor": 2}, {"plan_span": "sequence"}),
}
SLOW = pytest.mark.slow
SLOW_WAYS = {"data x tensor", "fsdp of 3, tied", "fsdp, muon"}  # the others have each part of them


def train_and_tell(values: dict, of_each: str) -> None:
    """A run whose processes record their share of each parameter."""
    finish = _Trainer._finish

    def tell(self) -> None:
        held = {
            name: (p.to_local() if isinstance(p, DTensor) else p).numel() / p.numel()
            for name, p in self.state.model.named_parameters()
        }
        Path(f"{of_each}.{self.processes.rank}").write_text(json.dumps(held))
        finish(self)

    _Trainer._finish = tell
    train_tiny(values)


def assert_same_run(one: Path, other: Path, close: float, of_weights: float) -> None:
    """
    The same numbers at every step and the same weights at the end.

    AdamW divides a gradient by its own size: where it is nearly zero, rounding decides the weight's first steps, which
    are of the size of the learning rate, 3e-3.
    """
    assert [line["step"] for line in untimed(one)] == [line["step"] for line in untimed(other)]
    texts = {"split", "warning", "advice"}
    counts = {"live_bits", "spikes"} if close > 1e-2 else set()  # a bit at the threshold falls to either side of it
    for ours, theirs in zip(untimed(one), untimed(other), strict=True):
        for name in ours.keys() - texts - counts:
            assert ours[name] == pytest.approx(theirs[name], abs=close, rel=close), (ours["step"], name)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], atol=of_weights, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[SLOW] * (way in SLOW_WAYS)) for way in WAYS])
def test_the_number_of_processes_changes_nothing_but_rounding(tmp_path, way):
    count, distributed, model = WAYS[way]
    optimizer = {"optimizer": "muon" if "muon" in way else "adamw"}
    training = {"gradient_accumulation_steps": 2, "batch_size": 5, "gradient_checkpointing": way == "hybrid"}
    sections = {"model": model, "training": {**training, **optimizer}}
    processes.run(1, train_tiny, tiny_values(tmp_path, "alone", **sections), log=tmp_path / "alone.log")
    values = tiny_values(tmp_path, "shared", **sections, distributed=distributed)
    processes.run(count, train_and_tell, values, str(tmp_path / "held"), log=tmp_path / "shared.log")
    # Muon's products are in bf16, so that a gradient's last digit may change its step by a hundredth
    close = {"close": 2e-3, "of_weights": 2e-2} if "muon" in way else {"close": 2e-5, "of_weights": 2e-4}
    assert_same_run(tmp_path / "shared", tmp_path / "alone", **close)

    held = [json.loads((tmp_path / f"held.{rank}").read_text()) for rank in range(count)]
    tensor, replicas = distributed.get("tensor", 1), distributed.get("replicas", 1)
    shards = count // tensor // replicas if distributed.get("fsdp") else 1
    for name in held[0]:
        split = tensor if name.endswith("_proj.weight") or "embed_tokens" in name or "lm_head" in name else 1
        assert sum(of_rank[name] for of_rank in held) == pytest.approx(count / shards / split), name
        if name.endswith("_proj.weight"):  # of an even number of rows
            assert {of_rank[name] for of_rank in held} == {1 / shards / split} or count == 3, name


def train_and_tell_dtypes(values: dict, out: str) -> None:
    forward, seen = DecoderLayer.forward, set()

    def watched(self, hidden_states, *arguments, **others):
        if self.training:
            seen.add((str(self.mlp.up_proj.weight.dtype), str(hidden_states.dtype)))
        return forward(self, hidden_states, *arguments, **others)

    DecoderLayer.forward = watched
    finish = _Trainer._finish

    def tell(self) -> None:
        kept = {str(parameter.dtype) for parameter in self.state.model.parameters()}
        Path(f"{out}.{self.processes.rank}").write_text(json.dumps([sorted(map(list, seen)), sorted(kept)]))
        finish(self)

    _Trainer._finish = tell
    train_tiny(values)


def test_shards_compute_in_bf16_and_keep_fp32(tmp_path):
    sections = {"training": {"precision": "bf16"}}
    processes.run(1, train_tiny, tiny_values(tmp_path, "alone", **sections), log=tmp_path / "alone.log")
    values = tiny_values(tmp_path, "shared", **sections, distributed={"fsdp": True})
    for log in ("shared.log", "shared again.log"):  # seldom, gloo has been seen to abort under bf16
        codes = processes.finish(start(2, train_and_tell_dtypes, values, str(tmp_path / "told"), log=tmp_path / log))
        if codes == [0, 0]:
            break
    assert codes == [0, 0], (tmp_path / log).read_text()
    for rank in (0, 1):
        seen, kept = json.loads((tmp_path / f"told.{rank}").read_text())
        assert seen == [["torch.bfloat16", "torch.bfloat16"]]
        assert kept == ["torch.float32"]
    assert_same_run(tmp_path / "shared", tmp_path / "alone", close=0.1, of_weights=0.1)


def muon_of_shards() -> None:
    """From the same gradients, the same steps as `torch.optim.Muon` takes with whole matrices."""
    with join_processes(DistributedSettings(fsdp=True), "cpu") as joined:
        torch.manual_seed(0)
        wholes = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 4), (4, 9), (6, 6))]
        mesh = joined.mesh["shard"]
        shards = [torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)])) for whole in wholes]
        settings = {"lr": 0.1, "weight_decay": 0.3}
        one, other = torch.optim.Muon(wholes, **settings), SharedMuon(shards, **settings)
        for _ in range(3):
            for whole, part in zip(wholes, shards, strict=True):
                whole.grad = torch.randn_like(whole)
                part.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            one.step()
            other.step()
        for whole, part in zip(wholes, shards, strict=True):
            assert_close(part.full_tensor(), whole.detach(), atol=1e-6, rtol=0)
            assert part.to_local().numel() < whole.numel()
            assert other.state[part]["momentum_buffer"].to_local().numel() < whole.numel()


def test_muon_of_shards_is_muon(tmp_path):
    processes.run(2, muon_of_shards, log=tmp_path / "log")


def test_a_checkpoint_of_two_processes_resumes_with_one_three_and_four(tmp_path):
    sections = {"distributed": {"fsdp": True}}
    whole = tiny_values(tmp_path, "alone")
    processes.run(1, train_tiny, whole, log=tmp_path / "alone.log")
    for count in (1, 3, 4):
        name = f"on-{count}"
        # all six steps are in the schedule of the learning rate, the first four are trained by two processes
        start_values = tiny_values(tmp_path, name, **sections, training={"async_save": True})
        processes.run(2, stop_after, start_values, 4, log=tmp_path / "two.log")
        assert [path.name for path in list_checkpoints(tmp_path / name / "checkpoints")] == ["step-2", "step-4"]
        files = [path.name for path in (tmp_path / name / "checkpoints" / "step-4").glob("*.safetensors")]
        assert {file.partition("-model")[0] for file in files} == {"shard-00001", "shard-00002"} and len(files) > 2
        processes.run(count, train_tiny, tiny_values(tmp_path, name, **sections), log=tmp_path / f"{name}.log")
        assert "resumed at step 4" in " ".join((tmp_path / f"{name}.log").read_text().split())
        assert_same_run(tmp_path / name, tmp_path / "alone", close=2e-5, of_weights=2e-4)


def stop_after(values: dict, step: int) -> None:
    """A run that is stopped by a signal to its last process during a step."""
    optimizer_step = _Trainer._optimizer_step

    def optimizer_step_that_stops(self, *arguments):
        if self.state.step == step - 1 and self.processes.rank == self.processes.size - 1:
            self.stop = StopRequest(signal.SIGTERM)
        return optimizer_step(self, *arguments)

    _Trainer._optimizer_step = optimizer_step_that_stops
    checkpoint.MIN_FILE_BYTES = 1000  # so that there are several files
    try:
        train_tiny(values)
    except SystemExit as end:
        assert end.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("distributed", [{"fsdp": True}, {"data": 2}, {"tensor": 2}])
def test_two_processes_resume_as_if_they_had_not_stopped(tmp_path, distributed):
    training = {"optimizer": "muon", "max_steps": 5, "eval_every": 0}
    sections = {"model": {"dropout": 0.2}, "distributed": distributed, "training": training}
    processes.run(2, train_tiny, tiny_values(tmp_path, "whole", **sections), log=tmp_path / "whole.log")
    processes.run(2, stop_after, tiny_values(tmp_path, "stopped", **sections), 3, log=tmp_path / "stopped.log")
    assert "stopped by SIGTERM at step 3, saved in" in (tmp_path / "stopped.log").read_text()
    processes.run(2, train_tiny, tiny_values(tmp_path, "stopped", **sections), log=tmp_path / "resumed.log")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", close=0, of_weights=0)


def test_processes_read_a_stream_each_its_own_documents(tmp_path):
    data = {"train": [str(tmp_path / "text.jsonl")], "streaming": True, "shuffle_buffer": 3, "workers": 1}
    values = tiny_values(tmp_path, "stream", data=data, distributed={"fsdp": True})
    processes.run(2, train_tiny, values, log=tmp_path / "stream.log")
    steps = [line["step"] for line in untimed(tmp_path / "stream") if line["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    processes.run(1, train_tiny, tiny_values(folder, "run"), log=folder / "log")
    return folder / "run"


@pytest.mark.parametrize(
    "options",
    [["--prior", "aggregate"], *(pytest.param(each, marks=SLOW) for each in ([], ["--method", "particle_filter"]))],
)
def test_an_evaluation_of_two_or_three_processes_has_the_numbers_of_one(tmp_path, trained, options):
    arguments = ["evaluate", str(trained), "--batch-size", "4", "--num-plans", "3", *options]
    found = {}
    for count in (1, 2, 3):
        processes.run(count, command, *arguments, log=tmp_path / f"{count}.log")
        found[count] = json.loads((trained / "metrics.json").read_text())
        for text in ("method", "plan_prior", "warning", "data", "model"):
            del found[count][text]
    for count in (2, 3):
        assert_close(found[count], found[1], atol=1e-6, rtol=1e-6)


def test_a_text_written_by_two_processes_is_that_of_one(tmp_path, trained):
    arguments = ["generate", str(trained), "--prompt", "the", "--num-samples", "2", "--max-new-tokens", "12"]
    for count in (1, 2):
        processes.run(count, command, *arguments, log=tmp_path / f"{count}.log")
    shown = (tmp_path / "1.log").read_text()
    assert "sample 2, plan" in shown
    lines = (tmp_path / "2.log").read_text().splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("[Gloo]")) == shown  # which PyTorch 2.10 prints


def test_matrices_that_cannot_be_shared_are_one_line(tmp_path, trained):
    codes = processes.finish(start(3, command, "generate", str(trained), log=tmp_path / "log"))
    assert codes == [2, 2, 2]
    assert "distributed.tensor=3: does not divide the model's 4 num_attention_heads" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"data": 3}, 2, r"data=3 and tensor=1 ask for other processes than the 2 that run"),
        ({"tensor": 3}, 4, r"data=auto and tensor=3 ask for other processes than the 4"),
        ({"data": 2}, 1, r"data=2 and tensor=1 .*start more with torchrun"),
        ({"tensor": 2}, 1, r"data=auto and tensor=2 .*start more with torchrun"),
        ({"replicas": 2}, 4, r"replicas=2: copies of a sharded model, with fsdp=true"),
        ({"replicas": 3, "fsdp": True}, 4, r"replicas=3: does not divide the 4 data processes"),
    ],
)
def test_processes_that_do_not_fit_the_settings_are_refused(settings, size, message):
    with pytest.raises(SettingsError, match=message):
        _data_processes(DistributedSettings(**settings), size)


@pytest.mark.parametrize("distributed", [{"data": 2}, {"tensor": 2}])
def test_one_process_refuses_what_needs_two(tmp_path, distributed):
    settings = parse_settings(tiny_values(tmp_path, "run", distributed=distributed))
    with pytest.raises(SettingsError, match="than the 1 that run"):
        train(settings, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_batch_with_fewer_rows_than_processes_is_one_line(tmp_path):
    values = tiny_values(tmp_path, "run", training={"batch_size": 1})
    assert processes.finish(start(2, train_tiny, values, log=tmp_path / "log")) == [2, 2]
    assert "batch_size=1: must be at least 2, one row for each process" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rows", "size", "tensor"), [(7, 3, 1), (8, 4, 2), (5, 5, 1), (64, 6, 3)])
def test_each_row_of_a_batch_goes_to_one_data_process(rows, size, tensor):
    cpu = torch.device("cpu")
    shares = [Processes(cpu, rank, size, tensor).local_slice(rows) for rank in range(0, size, tensor)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    assert max(s.stop - s.start for s in shares) - min(s.stop - s.start for s in shares) <= 1


def wait_for(happens, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("lost", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_is_lost_ends_the_others_and_is_named(tmp_path, lost, how):
    training = {"max_steps": 100_000, "save_every": 5, "eval_every": 0}
    distributed = {"fsdp": True, "timeout": 6}
    values = tiny_values(tmp_path, "run", training=training, distributed=distributed, logging={"sample_every": 0})
    both = start(2, train_tiny, values, log=tmp_path / "log")
    try:
        wait_for(lambda: list_checkpoints(tmp_path / "run" / "checkpoints"))
        os.kill(both[lost].pid, how)
        left = both[1 - lost]
        left.join(processes.SECONDS)
        assert left.exitcode == 1
    finally:
        for process in both:
            process.kill()
    told = (tmp_path / ("log" if lost else "log.1")).read_text()
    assert re.search(rf"error \(rank {1 - lost}\): rank {lost} of 2 ended or does not answer", told)
    assert "Traceback" not in told
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


def torchrun(*arguments: str) -> subprocess.Popen:
    program = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def of_the_faq(run_dir: Path) -> list[str]:
    """The FAQ's command after `torchrun`'s arguments, shortened."""
    words = ["examples/train_free.py", "--config", "configs/free_transformer.yaml", "--use-fsdp", f"run_dir={run_dir}"]
    words += ["training.max_steps=2", "training.batch_size=4", "training.device=cpu", "logging.sample_tokens=2"]
    return [*words, "data.train=[letters:20:0]", "data.validation=[letters:4:1]", "logging.tensorboard=false"]


def test_the_command_of_the_faq_shards_over_the_processes_of_this_machine(tmp_path):
    started = torchrun("--nproc_per_node=auto", *of_the_faq(tmp_path / "run"))
    told, _ = started.communicate(timeout=200)
    assert started.returncode == 0, told
    told = " ".join(told.split())
    if (count := os.cpu_count()) and count > 1:
        assert f"{count} processes on cpu: {count} share each batch, the model sharded over {count} (gloo" in told
    else:
        assert "nothing to shard with one process" in told
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@SLOW
def test_two_machines_with_a_launcher_each_train_one_model(tmp_path):
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    of_torchrun = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=test", endpoint]
    machines = [torchrun(*of_torchrun, *of_the_faq(tmp_path / "run")) for _ in range(2)]
    told = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert sum("2 processes on cpu" in " ".join(each.split()) for each in told) == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_processes_pass_over_a_damaged_checkpoint_together(tmp_path):
    values = tiny_values(tmp_path, "run", distributed={"fsdp": True})
    processes.run(2, stop_after, values, 5, log=tmp_path / "log")
    shard = next((tmp_path / "run" / "checkpoints" / "step-5").glob("shard-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    processes.run(2, train_tiny, values, log=tmp_path / "log")
    told = " ".join((tmp_path / "log").read_text().split())
    assert re.search(r"step-5: cannot be read \(shard-00002\S* has 1000 bytes of \d+\).* resuming from step-4", told)
