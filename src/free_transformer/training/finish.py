"""Steps after training: loads the best weights, gathers the aggregate prior, and writes the model folder."""

import itertools

from transformers import PreTrainedTokenizerBase

from free_transformer.distributed.parallelize import whole_state_dict
from free_transformer.distributed.processes import Processes
from free_transformer.files import new_folder
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runs.model_card import write_model_card
from free_transformer.runs.monitor import Monitor
from free_transformer.runs.run import Run
from free_transformer.settings import Settings
from free_transformer.settings.curriculum import stages_of
from free_transformer.training.adapters import merge_adapters, write_adapters
from free_transformer.training.batches import TrainingData, training_batches
from free_transformer.training.checkpoint import TrainState, load_checkpoint
from free_transformer.training.evaluation_mode import evaluation_mode
from free_transformer.training.signals import StopRequest
from free_transformer.training.step import autocast


def load_best_weights(run: Run, state: TrainState, processes: Processes, monitor: Monitor) -> None:
    """Loads the checkpoint of the best validation, if the settings ask to keep it."""
    if not monitor.settings.keeps_best or monitor.best is None or monitor.is_best(state.step):
        return
    loss, step = monitor.best
    path = run.checkpoints / f"step-{step}"
    if not path.is_dir():
        text = f"{path}, the best checkpoint, is missing: model/ has the weights of step {state.step}"
        monitor.message(text, "warning")
        return
    stopped_at = state.step
    load_checkpoint(path, state, processes)
    monitor.message(
        f"stopped at step {stopped_at}; model/ has the weights of step {step}, the best on held-out text ({loss:.4f})"
    )


def gather_prior(
    settings: Settings,
    state: TrainState,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    stop: StopRequest,
) -> None:
    """
    Computes the aggregate prior of a Free Transformer from `evaluation.prior_rows` rows of training text.

    Args:
        data: training text of the last stage.
    """
    model, wanted, stage = state.model, settings.evaluation.prior_rows, stages_of(settings)[-1]
    if not isinstance(model, FreeTransformer) or wanted == 0:
        return
    alone = Processes(processes.device)  # every process reads the same rows and computes the same prior
    batches = training_batches(data, stage, tokenizer, settings, alone)
    batches = itertools.islice(batches, -(-wanted // stage.batch_size))
    with (
        evaluation_mode(model, processes.device, settings.training.seed),
        autocast(settings.training.precision, processes),
    ):
        model.gather_prior(stop.checked(batches))


def write_model(
    run: Run, state: TrainState, tokenizer: PreTrainedTokenizerBase, processes: Processes, trained: int
) -> None:
    """
    Writes `model/` with its tokenizer and card, and `adapter/` of a run with LoRA.

    Args:
        trained: the step that training has reached.
    """
    model = state.model
    if state.adapters is not None:
        with new_folder(run.adapter_folder) as folder:
            write_adapters(state.adapters, folder)
        model = merge_adapters(state.adapters)
    weights = {} if processes.size == 1 else {"state_dict": whole_state_dict(model)}
    if processes.main:
        with run.new_model(state.step, trained) as folder:
            model.save_pretrained(folder, **weights)
            tokenizer.save_pretrained(folder)
            write_model_card(run, folder)
    processes.barrier()
