"""From settings to what a run trains: the model, spread over its processes, and the optimizers."""

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import begin_token
from free_transformer.model import FreeTransformer, build_baseline
from free_transformer.training.checkpoint import TrainState
from free_transformer.training.optimizers import build_optimizers, table_optimizer
from free_transformer.training.parallel import parallelize
from free_transformer.training.processes import Processes
from free_transformer.training.settings import Settings, SettingsError
from free_transformer.training.step import computing_dtype


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that the settings describe, free or baseline, for this tokenizer."""
    config = settings.model.build(
        vocab_size=len(tokenizer),
        kl_weight=settings.training.kl_weight,
        bos_token_id=begin_token(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({} if _names_length(settings) else {"max_seq_len": settings.training.seq_len}),
    )
    if config.max_position_embeddings < settings.training.seq_len:
        raise SettingsError(
            f"training.seq_len={settings.training.seq_len} is longer than model.max_seq_len="
            f"{config.max_position_embeddings}"
        )
    return build_baseline(config) if settings.model.kind == "baseline" else FreeTransformer(config)


def _names_length(settings: Settings) -> bool:
    return bool({"max_seq_len", "max_position_embeddings"} & (settings.model.model_extra or {}).keys())


def new_state(settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> TrainState:
    """Model and optimizers at step 0; torch's random numbers are left seeded. `SettingsError` as by its parts."""
    training, alone = settings.training, processes.size == 1
    dtype = computing_dtype(training.precision, processes)
    torch.manual_seed(training.seed)
    model = build_model(settings, tokenizer)
    parallelize(model, processes, training.gradient_checkpointing, training.compile, dtype)
    model.to(processes.device)  # type: ignore[arg-type]
    if not alone:  # dropout: another one in each process
        torch.manual_seed(int(np.random.SeedSequence([training.seed, processes.rank]).generate_state(1)[0]))
    scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)
    return TrainState(model, build_optimizers(model, training, sparse_tables=alone), scaler)


def resolved(settings: Settings, model: PreTrainedModel, alone: bool) -> Settings:
    """The settings with what was left to the library as it was decided."""
    settings = settings.model_copy(deep=True)
    if isinstance(model, FreeTransformer):
        settings.model = settings.model.model_copy(update={"plan_gradient": model.config.plan_gradient})
        settings.training.table_optimizer = table_optimizer(model, settings.training, sparse_tables=alone)
    return settings
