"""
`transformers.Trainer`, and trainers built on it, with numbers of a Free Transformer that may be compared.

What the model returns with labels is no evaluation: its plan comes from the encoder, which has read the answer. And
trainers that compute the loss themselves from the decoder, as TRL's do, leave out both the plan and its KL.

Needs `accelerate`: pip install 'free-transformer-lm[trainers]'.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, unwrap_peft_model

from free_transformer.evaluation import evaluate_likelihood
from free_transformer.model.losses import predicted_tokens
from free_transformer.model.modeling import FreeTransformer
from free_transformer.training.optimizers import LARGE_TABLE, RowAdamW, plan_rates

NEW = ("encoder", "plan_table")  # parts that no pretrained model brings
LOGGED = ("reconstruction", "kl", "hinge")
READ = ("input_ids", "attention_mask", "position_ids", "labels")  # all that the likelihood needs of a batch
IN_NATS = ("elbo", "nll", "reconstruction", "prior", "gap")


@dataclass
class _LossParts:
    """Of the micro-batches since the last log; on the device, since reading a number there would wait for it."""

    first_step: int
    micro_batches: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)


class PlanTrainer(Trainer):
    """
    `Trainer` for a `FreeTransformer`, alone, compiled or inside PEFT; any other model is trained as ever.

    To train on texts with another trainer put this one first: `class PlanSFTTrainer(PlanTrainer, SFTTrainer): pass`.
    Trainers on preferences or rewards have losses of their own, which this would replace.

    Training logs `reconstruction` (nats per predicted token), `kl` (bits per plan) and `hinge` (bits per plan beyond
    the free bits) beside `loss`. An evaluation's `eval_loss` is the ELBO in nats per token, an upper bound of the
    negative log-likelihood, and so is what early stopping and the best checkpoint go by. Beside it stand `eval_nll`,
    `eval_reconstruction`, `eval_prior` and `eval_gap` (nats per token) and `eval_kl` (bits per plan), as in
    `Likelihood`. `compute_metrics` gets logits under a plan from the prior. Evaluations have their own random numbers.

    Where rows do not divide evenly among processes, `accelerate` repeats some, and they count twice. The likelihood
    calls parts of the model by themselves, which sharded weights (FSDP, ZeRO-3) do not allow: shard with
    `free-transformer train` instead.

    Args:
        num_samples: plans drawn for each held-out text, see `evaluate_likelihood`.
        plan_learning_rate: peak rate of the encoder, the table's following from it; default `learning_rate`, or where a
            pretrained model has brought the rest ten times that (`training.optimizers.plan_rates`).

    Raises:
        ValueError: for losses that know no KL: label smoothing, `compute_loss_func`, TRL's `loss_type`.
    """

    def __init__(self, *args: Any, num_samples: int = 4, plan_learning_rate: float | None = None, **kwargs: Any):
        args = tuple(_with_the_model_s_loss(each) for each in args)
        kwargs = {name: _with_the_model_s_loss(value) for name, value in kwargs.items()}
        super().__init__(*args, **kwargs)
        self.num_samples = num_samples
        self.plan_learning_rate = plan_learning_rate
        self._likelihood_sums: list[dict[str, float]] = []  # of each batch of an evaluation
        self._parts: _LossParts | None = None
        if self._free_transformer() is not None:
            self._refuse_other_losses()

    def _refuse_other_losses(self) -> None:
        without = "without the KL of its plans"
        loss_type = getattr(self.args, "loss_type", None)
        if loss_type not in (None, "nll"):
            raise ValueError(
                f"loss_type={loss_type!r}: a loss of TRL {without}. SFTTrainer is supported, with loss_type='nll'; "
                "trainers on preferences or rewards (DPO, GRPO, KTO, ...) are not"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "label_smoothing_factor and compute_loss_func replace the loss of a Free Transformer by one "
                f"{without}: leave them out"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """
        The Trainer's own, with the new parts in groups of their own rates. Where it is AdamW and the codebook is large,
        only the rows of sampled plans are updated, see `RowAdamW`.
        """
        made: bool = self.optimizer is None  # type: ignore[has-type]
        optimizer = super().create_optimizer(*args, **kwargs)
        model = self._free_transformer()
        if model is None or not made:
            return optimizer
        by_row = type(optimizer) is torch.optim.AdamW and len(model.plan_table.weight) > LARGE_TABLE
        rates = dict(zip(NEW, plan_rates(model, self.args.learning_rate, self.plan_learning_rate), strict=True))
        part_of = {
            parameter: part for name, parameter in model.named_parameters() for part in NEW if name.startswith(part)
        }
        for group in list(optimizer.param_groups):
            for part, rate in rates.items():
                changes = {"lr": rate}
                if by_row and part == "plan_table":
                    changes |= {"weight_decay": 0.0, "by_row": True}
                moved = [parameter for parameter in group["params"] if part_of.get(parameter) == part]
                if moved and any(group.get(name) != value for name, value in changes.items()):
                    group["params"] = [parameter for parameter in group["params"] if part_of.get(parameter) != part]
                    optimizer.add_param_group({**group, "params": moved, **changes})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        if by_row:
            defaults = {k: v for k, v in optimizer.defaults.items() if k != "decoupled_weight_decay"}
            self.optimizer = optimizer = RowAdamW(optimizer.param_groups, **defaults)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self._free_transformer() is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and not return_outputs and "labels" in inputs:
            inputs = {**inputs, "skip_logits": True}
        # Not `super()`: TRL's loss comes from `model.model`, a Llama that neither has a plan nor trains the encoder.
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if model.training:
            self._add_parts(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts is not None:
            logs.update(self._mean_parts(self._parts))
        if "loss" in logs or "train_loss" in logs:  # the latter at the end, where steps may be left
            self._parts = None
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The ELBO of a batch in nats per token, logits under a plan from the prior, and labels."""
        if self._free_transformer() is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels, loss = inputs.get("labels"), None
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            if labels is not None and predicted_tokens(labels) > 0:
                loss = torch.tensor(self._add_likelihood(inputs), device=self.args.device)
            if prediction_loss_only:
                return loss, None, None
            without_labels = {name: value for name, value in inputs.items() if name != "labels"}
            logits = model(**without_labels, mode="inference").logits
        return loss, logits, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._free_transformer() is None:
            return super().evaluation_loop(*arguments)
        self._likelihood_sums = []
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            output = super().evaluation_loop(*arguments)
        batches = gather_object(self._likelihood_sums)
        if batches:
            total = {name: sum(batch[name] for batch in batches) for name in batches[0]}
            means = {name: total[name] / total["tokens"] for name in IN_NATS}
            means = {"loss": means.pop("elbo"), **means, "kl": total["kl_bits"] / total["plans"]}
            output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in means.items()})
        return output

    def _free_transformer(self) -> FreeTransformer | None:
        model = unwrap_peft_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        return model if isinstance(model, FreeTransformer) else None

    def _add_likelihood(self, inputs: dict[str, Any]) -> float:
        """Adds the sums of a batch to those of the evaluation; returns its ELBO in nats per token."""
        model = self._free_transformer()
        assert model is not None
        batch = {name: inputs[name] for name in READ if inputs.get(name) is not None}
        torch.manual_seed(self.args.seed + len(self._likelihood_sums))  # whatever the data or the logits have drawn
        likelihood = evaluate_likelihood(model, [batch], self.num_samples)
        names = (*IN_NATS, "kl_bits", "plans", "tokens")
        self._likelihood_sums.append({name: float(np.sum(likelihood.per_document[name])) for name in names})
        assert likelihood.elbo is not None
        return likelihood.elbo

    def _add_parts(self, outputs: Any, num_items_in_batch: Tensor | int | None) -> None:
        if self._parts is None:
            self._parts = _LossParts(self.state.global_step)
        parts = self._parts
        parts.micro_batches += 1
        for name in LOGGED:
            value = getattr(outputs, name, None)
            if value is None:
                continue
            value = value.detach().float().mean()
            if name == "reconstruction":  # as the Trainer does with the loss, so that those of a step add up to its own
                if num_items_in_batch is None:
                    value = value / self.current_gradient_accumulation_steps
                elif self.args.average_tokens_across_devices:
                    value = value * (self.accelerator.num_processes // self.get_tp_size())
            parts.totals[name] = parts.totals.get(name, 0) + value

    def _mean_parts(self, parts: _LossParts) -> dict[str, float]:
        """A mean over steps where a step's micro-batches add up, else over micro-batches; over all processes."""
        steps = self.state.global_step - parts.first_step
        means = [
            total / (steps if name == "reconstruction" else parts.micro_batches) for name, total in parts.totals.items()
        ]
        values = self.accelerator.reduce(torch.stack(means), "mean").tolist()
        return dict(zip(parts.totals, values, strict=True))


def _with_the_model_s_loss(arguments: Any) -> Any:
    """For `loss_type="chunked_nll"`, by which TRL would replace the model's `forward`: the same loss as `"nll"`."""
    if getattr(arguments, "loss_type", None) != "chunked_nll":
        return arguments
    arguments = copy.copy(arguments)
    arguments.loss_type = "nll"
    return arguments
