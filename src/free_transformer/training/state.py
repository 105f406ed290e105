"""Builds the state of a run from its settings: the model, parallelized over processes, and the optimizers."""

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import begin_token, vocabulary_size
from free_transformer.distributed.parallelize import parallelize
from free_transformer.distributed.processes import Processes
from free_transformer.model.initialization import build_baseline
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runs.load_model import load_pretrained
from free_transformer.settings import Settings, SettingsError
from free_transformer.training.adapters import add_adapters
from free_transformer.training.checkpoint import TrainState
from free_transformer.training.optimizers import build_optimizers, codebook_optimizer
from free_transformer.training.step import computing_dtype


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Builds the model that the settings describe, free or baseline, new or pretrained, for this tokenizer."""
    if settings.model.pretrained is not None:
        model = _pretrained(settings)
    else:
        config = settings.model.build(
            vocab_size=vocabulary_size(tokenizer),
            kl_weight=settings.training.kl_weight,
            bos_token_id=begin_token(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **({} if _names_length(settings) else {"max_seq_len": settings.training.seq_len}),
        )
        model = build_baseline(config) if settings.model.kind == "baseline" else FreeTransformer(config)
    if model.config.max_position_embeddings < settings.training.seq_len:
        raise SettingsError(
            f"training.seq_len={settings.training.seq_len} is longer than model.max_seq_len="
            f"{model.config.max_position_embeddings}"
        )
    if model.config.vocab_size < (size := vocabulary_size(tokenizer)):
        raise SettingsError(
            f"data.tokenizer={settings.data.tokenizer}: token ids up to {size - 1}, but {settings.model.pretrained} "
            f"has {model.config.vocab_size} tokens; use the tokenizer of the model"
        )
    return model


def _pretrained(settings: Settings) -> PreTrainedModel:
    """Loads a pretrained model in single precision, ready to train. `training.precision` only affects computation."""
    model, folder = settings.model, settings.model.pretrained
    assert folder is not None
    try:
        if model.kind == "free":
            config = model.build(kl_weight=settings.training.kl_weight)
            loaded = load_pretrained(folder, FreeTransformer, config=config, dtype=torch.float32)
        else:
            loaded = load_pretrained(folder, dtype=torch.float32)
    except SettingsError as error:
        raise SettingsError(f"model.pretrained={error}") from error
    if model.kind == "baseline" and isinstance(loaded, FreeTransformer):
        raise SettingsError(
            f"model.pretrained={folder}: is a Free Transformer; a baseline needs a model without a plan"
        )
    if settings.training.freeze_first_half:
        loaded.get_input_embeddings().requires_grad_(False)
        loaded.model.layers[: loaded.config.num_hidden_layers // 2].requires_grad_(False)
    return loaded.train()


def _names_length(settings: Settings) -> bool:
    return bool({"max_seq_len", "max_position_embeddings"} & (settings.model.model_extra or {}).keys())


def new_state(settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> TrainState:
    """Builds model and optimizers at step 0, and seeds torch's random numbers. Raises `SettingsError`."""
    training, alone = settings.training, processes.size == 1
    dtype = computing_dtype(training.precision, processes)
    torch.manual_seed(training.seed)
    model = build_model(settings, tokenizer)
    adapters = None
    if training.lora_rank:
        if not alone:
            raise SettingsError(
                f"training.lora_rank={training.lora_rank}: adapters need a single process; start it without torchrun"
            )
        first_layer = model.config.num_hidden_layers // 2 if training.freeze_first_half else 0
        adapters = add_adapters(model, training.lora_rank, first_layer)
    parallelize(model, processes, training.gradient_checkpointing, training.compile, dtype)
    if not alone:  # different dropout in each process
        torch.manual_seed(int(np.random.SeedSequence([training.seed, processes.rank]).generate_state(1)[0]))
    scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)
    return TrainState(model, build_optimizers(model, settings, sparse_tables=alone), scaler, adapters)


def resolved(settings: Settings, model: PreTrainedModel) -> Settings:
    """Returns the settings with automatic values resolved."""
    settings = settings.model_copy(deep=True)
    settings.optimizer.name = settings.optimizer_name
    if isinstance(model, FreeTransformer):
        settings.model = settings.model.model_copy(update={"plan_gradient": model.config.plan_gradient})
        settings.optimizer.codebook = codebook_optimizer(model, settings)
    return settings
