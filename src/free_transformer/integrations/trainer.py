"""
Training and evaluation of Free Transformers with `transformers.Trainer` and trainers derived from it.

The loss that the model returns with labels is not suitable for evaluation, because its plan comes from the encoder,
which has read the answer. Trainers that compute the loss from the decoder themselves, like those of TRL, omit the plan
and its KL.

Needs `accelerate`: pip install 'free-transformer-lm[trainers]'.
"""

import copy
import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, unwrap_peft_model

from free_transformer.errors import InputError
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.model.compat import CausalLMOutputWithPast as CausalLMOutput
from free_transformer.model.losses import predicted_tokens
from free_transformer.model.modeling import FreeTransformer
from free_transformer.training.optimizers import LARGE_TABLE, RowAdamW, plan_rates

NEW = ("encoder", "plan_table")  # parameters that a pretrained Llama does not have
LOGGED = ("reconstruction", "kl", "hinge")
READ = ("input_ids", "attention_mask", "position_ids", "labels")  # the part of a batch that the likelihood needs
IN_NATS = ("elbo", "nll", "reconstruction", "prior", "gap")


@dataclass
class _LossParts:
    """
    Sums over the micro-batches since the last log entry. They stay on the device, since reading them would synchronize.
    """

    first_step: int
    micro_batches: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)


class PlanTrainer(Trainer):
    """
    `Trainer` for a `FreeTransformer`, which may be compiled or wrapped by PEFT. Other models are trained as usual.

    To combine it with another trainer, list it first: `class PlanSFTTrainer(PlanTrainer, SFTTrainer): pass`. Trainers
    for preferences or rewards are not supported, because this class would replace their losses.

    Training logs `loss`, `reconstruction` (nats per predicted token), `kl` (bits per plan) and `hinge` (bits per plan
    beyond the free bits). Evaluation reports the ELBO as `eval_loss`, in nats per token. It is an upper bound of the
    negative log-likelihood, and determines early stopping and the best checkpoint. Evaluation also reports `eval_nll`,
    `eval_reconstruction`, `eval_prior` and `eval_gap` (nats per token) and `eval_kl` (bits per plan), see `Likelihood`.
    `compute_metrics` receives logits under a plan from the prior. Evaluations have their own random stream.

    If rows do not divide evenly among processes, `accelerate` repeats some of them, which then count twice. The
    likelihood calls parts of the model separately, which sharded weights (FSDP, ZeRO-3) do not support. Use
    `free-transformer train` for sharding.

    Args:
        num_samples: number of plans sampled for each held-out text, see `evaluate_likelihood`.
        plan_learning_rate: peak learning rate of the encoder, from which that of the codebook is derived. Default:
            `learning_rate`, or ten times that if the Llama is pretrained (see `training.optimizers.plan_rates`).

    Raises:
        InputError: for losses without the KL: label smoothing, `compute_loss_func`, other values of TRL's `loss_type`.
    """

    def __init__(self, *args: object, num_samples: int = 4, plan_learning_rate: float | None = None, **kwargs: object):
        args = tuple(_with_model_loss(each) for each in args)
        kwargs = {name: _with_model_loss(value) for name, value in kwargs.items()}
        super().__init__(*args, **kwargs)
        self.num_samples = num_samples
        self.plan_learning_rate = plan_learning_rate
        self._likelihood_sums: list[dict[str, float]] = []  # per batch of the current evaluation
        self._parts: _LossParts | None = None
        if self._free_transformer() is not None:
            self._check_loss()

    def _check_loss(self) -> None:
        without = "without the KL of its plans"
        loss_type = getattr(self.args, "loss_type", None)
        if loss_type not in (None, "nll"):
            raise InputError(
                f"loss_type={loss_type!r}: a loss of TRL {without}. SFTTrainer is supported with loss_type='nll'; "
                "trainers on preferences or rewards (DPO, GRPO, KTO, ...) are not"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise InputError(
                "label_smoothing_factor and compute_loss_func replace the loss of a Free Transformer with one "
                f"{without}: remove them"
            )

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """
        Creates the optimizer of `Trainer`, with separate parameter groups and learning rates for the encoder and the
        codebook. AdamW with a large codebook only updates the rows of sampled plans, see `RowAdamW`.
        """
        is_new = getattr(self, "optimizer", None) is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        model = self._free_transformer()
        if model is None or not is_new:
            return optimizer
        by_row = type(optimizer) is torch.optim.AdamW and len(model.plan_table.weight) > LARGE_TABLE
        rates = dict(zip(NEW, plan_rates(model, self.args.learning_rate, self.plan_learning_rate), strict=True))
        part_of = {
            parameter: part for name, parameter in model.named_parameters() for part in NEW if name.startswith(part)
        }
        for group in list(optimizer.param_groups):
            for part, rate in rates.items():
                changes: dict[str, float | bool] = {"lr": rate}
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
        inputs: dict[str, Tensor | bool],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, CausalLMOutput]:
        if self._free_transformer() is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training and not return_outputs and "labels" in inputs:
            inputs = {**inputs, "skip_logits": True}
        # Not `super()`: TRL computes its loss from `model.model`, a Llama without a plan, and never trains the encoder.
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if model.training:
            self._add_parts(outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts is not None:
            logs.update(self._mean_parts(self._parts))
        if "loss" in logs or "train_loss" in logs:  # the latter is logged at the end of training, when steps may remain
            self._parts = None
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the ELBO of a batch in nats per token, logits under a plan from the prior, and the labels."""
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
        run = functools.partial(
            super().evaluation_loop,
            dataloader,
            description,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        if self._free_transformer() is None:
            return run()
        self._likelihood_sums = []
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            output = run()
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

    def _add_likelihood(self, inputs: dict[str, Tensor]) -> float:
        """Adds the sums of a batch to those of the evaluation, and returns the ELBO of the batch in nats per token."""
        model = self._free_transformer()
        assert model is not None
        batch = {name: inputs[name] for name in READ if inputs.get(name) is not None}
        torch.manual_seed(self.args.seed + len(self._likelihood_sums))  # independent of other random numbers
        likelihood = evaluate_likelihood(model, [batch], self.num_samples)
        names = (*IN_NATS, "kl_bits", "plans", "tokens")
        self._likelihood_sums.append({name: float(np.sum(likelihood.per_document[name])) for name in names})
        assert likelihood.elbo is not None
        return likelihood.elbo

    def _add_parts(self, outputs: CausalLMOutput, num_items_in_batch: Tensor | int | None) -> None:
        if self._parts is None:
            self._parts = _LossParts(self.state.global_step)
        parts = self._parts
        parts.micro_batches += 1
        for name in LOGGED:
            value = getattr(outputs, name, None)
            if value is None:
                continue
            value = value.detach().float().mean()
            if name == "reconstruction":  # scaled like the loss, so that the parts of a step add up to it
                if num_items_in_batch is None:
                    value = value / self.current_gradient_accumulation_steps
                elif self.args.average_tokens_across_devices:
                    value = value * (self.accelerator.num_processes // self.get_tp_size())
            parts.totals[name] = parts.totals.get(name, 0) + value

    def _mean_parts(self, parts: _LossParts) -> dict[str, float]:
        """
        Averages the sums over all processes: over steps if the values of micro-batches add up to that of a step,
        otherwise over micro-batches.
        """
        steps = self.state.global_step - parts.first_step
        means = [
            total / (steps if name == "reconstruction" else parts.micro_batches) for name, total in parts.totals.items()
        ]
        values = self.accelerator.reduce(torch.stack(means), "mean").tolist()
        return dict(zip(parts.totals, values, strict=True))


def _with_model_loss(argument: object) -> object:
    """Replaces `loss_type="chunked_nll"`, for which TRL overrides the model's `forward`, by the equivalent `"nll"`."""
    if getattr(argument, "loss_type", None) != "chunked_nll":
        return argument
    changed = copy.copy(argument)
    setattr(changed, "loss_type", "nll")  # noqa: B010  # a field that only the configurations of TRL have
    return changed
