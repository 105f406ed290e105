"""
`lm-evaluation-harness` for Free Transformers: likelihoods averaged over plans, and texts generated under sampled plans.

The likelihood of a continuation is the probability that `generate` assigns to it,

    log 1/S sum_s p(continuation | prompt, Z_s).

The plans `Z_s` of the prompt are read from the prompt alone or sampled from the prior. The plans of the following
tokens come from the prior (see `harness_plans.py`). The encoder never reads a continuation, since it would read the
answer. A whole document (`loglikelihood_rolling`) has no prompt. Its likelihood is the importance-weighted bound of
`evaluate_likelihood`.

If plans have no effect (R = 0, a converted Llama), all computations are those of the Llama, and the scores equal those
of the harness's `hf` bit-for-bit.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from free_transformer.errors import InputError
from free_transformer.integrations.harness_plans import PlanSampler
from free_transformer.integrations.harness_scoring import Row, Score, log_mean_exp
from free_transformer.integrations.harness_tasks import find_tasks, result_table, run_tasks
from free_transformer.model.layout import num_plans as plans_for
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.outputs import LowerOutput
from free_transformer.model.sampling import PROMPT_PLANS, check_choice

__all__ = ["PlanHarnessLM", "Row", "find_tasks", "log_mean_exp", "model_folder", "result_table", "run_tasks"]

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings (None: a document), prompt, continuation


@register_model("free-transformer")
class PlanHarnessLM(HFLM):
    """
    `lm_eval`'s `hf` for Free Transformers.

    `plan_seed` and the prompt determine the plans of a request. They do not depend on the batch or on other requests,
    and all choices of a question are scored under the same plans.

    Args:
        pretrained: a model, given with its `tokenizer`, or the folder of a run, a model or a plain Llama.
        num_plans: S, number of plans that a likelihood is averaged over. Each generated text has one plan.
        prompt_plan: `"posterior"`, the encoder reads the prompt, or `"prior"`. It also applies to whole documents:
            plans from the prior need no importance weights, but give a looser bound.
        prior: prior of all other plans, `"uniform"` or `"aggregate"`.
        plan_seed: seed of the plans.
        device: default: the GPU if there is one.
        kwargs: arguments of `HFLM`.

    Raises:
        InputError: for other values, and for models without a plan.
    """

    AUTO_MODEL_CLASS = FreeTransformer

    def __init__(
        self,
        pretrained: str | Path | FreeTransformer,
        num_plans: int = 16,
        prompt_plan: str = "posterior",
        prior: str = "uniform",
        plan_seed: int = 0,
        device: str | None = None,
        **kwargs: object,
    ):
        if num_plans < 1:
            raise InputError(f"num_plans={num_plans}: must be at least 1")
        check_choice("prompt_plan", prompt_plan, PROMPT_PLANS)
        if isinstance(pretrained, str | Path):
            pretrained = model_folder(Path(pretrained))
        elif not hasattr(pretrained, "infer_plan"):
            raise InputError(f"pretrained is a {type(pretrained).__name__}: a FreeTransformer or a folder is needed")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, backend="causal", device=device, **kwargs)
        self.num_plans = num_plans
        self.prompt_plan = prompt_plan
        self.prior = prior
        self.plan_seed = plan_seed
        self._plans = PlanSampler(self.model, prompt_plan, prior, plan_seed, self.prefix_token_id)
        self.standard_errors: dict[str, list[float]] = defaultdict(list)  # of each request, by task
        self._errors: list[float] = []  # of the current call, in the order of its requests or windows
        self._generated: Counter[tuple[int, ...]] = Counter()  # number of texts generated for each prompt

    def get_model_info(self) -> dict[str, object]:
        """
        Adds how plans were sampled, and `plan_standard_errors`: the standard error of a log-likelihood in nats, from
        the spread over plans, averaged over the requests of each task.
        """
        return {
            **super().get_model_info(),
            "num_plans": self.num_plans,
            "prompt_plan": self.prompt_plan,
            "prior": self.prior,
            "plan_seed": self.plan_seed,
            "plan_standard_errors": {
                task: sum(errors) / len(errors) for task, errors in self.standard_errors.items() if errors
            },
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._errors.clear()
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        for request, error in zip(requests, self._errors, strict=True):
            self.standard_errors[request.task_name or ""].append(error)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Documents longer than the model can read are cut into windows, as by `hf`. Each window has its own plans."""
        self._errors.clear()
        answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        errors = iter(self._errors)
        for request in requests:
            windows = -(-len(self.tok_encode(*request.args)) // self.max_length)
            self.standard_errors[request.task_name or ""].append(math.hypot(*islice(errors, windows)))
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """Scores the longest requests first. Requests that differ only in their last token share a row."""
        groups = _grouped(requests)
        detects = self.batch_size == "auto" and not override_bs and bool(groups)
        if detects:
            self.batch_sizes: dict[int, int] = {}
        size = (override_bs or 0) if self.batch_size == "auto" else self.batch_size
        found: list[Score | None] = [None] * len(requests)
        hidden = disable_tqdm or self.rank != 0 or override_bs is not None  # documents arrive one batch at a time
        progress = tqdm(total=len(requests), disable=hidden, desc="log-likelihoods")
        for chunk in Collator.get_chunks(groups, n=size, fn=self._batch_scheduler if detects else None):
            batch = [self._row([requests[index] for index in indices]) for indices, *_ in chunk]
            self._score(batch)
            for (indices, *_), row in zip(chunk, batch, strict=True):
                for index, answer in zip(indices, row.answers(), strict=True):
                    found[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer[:2])
                progress.update(len(indices))
        progress.close()
        scores = cast(list[Score], found)
        self._errors += [error for _, _, error in scores]
        return [(value, greedy) for value, greedy, _ in scores]

    def _row(self, requests: list[Request]) -> Row:
        strings, prompt, continuation = requests[0]
        if len(continuation) > self.max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens: this model reads at most {self.max_length}"
            )
        text = prompt + continuation
        if len(text) > self.max_length + 1:
            logger.warning(
                "%d tokens: truncated on the left to %d, the maximum length of this model", len(text), self.max_length
            )
        targets = torch.tensor([continuation for _, _, continuation in requests], device=self.device)
        return Row(prompt, text[-(self.max_length + 1) :], targets, strings is None, [])

    def _score(self, batch: list[Row]) -> None:
        """Runs the lower layers once, and the upper layers once for each plan."""
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, mixed, enabled=mixed is not None):
            tokens, lower = self._read([row.text[:-1] for row in batch])  # nothing is predicted from the last token
            ends = [len(row.text) - 1 if row.whole else row.start + 1 for row in batch]
            keys = [row.text if row.whole else row.prompt for row in batch]
            count = plans_for(self.model.config.plan_span, tokens.shape[1])
            plans, log_ratios = self._plans.sample(lower, tokens, ends, keys, count, self.num_plans)
            first = min(row.start for row in batch) if self._plans.plan_has_effect else 0
            columns = torch.arange(first, tokens.shape[1], device=tokens.device)
            for plan, ratios in zip(plans, log_ratios, strict=True):
                logits = self.model.upper_layers(lower, plan, logits_to_keep=columns)
                log_probs = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
                for row, row_log_probs, ratio in zip(batch, log_probs, ratios, strict=True):
                    row.add(
                        row_log_probs[row.start - first : len(row.text) - 1 - first],
                        ratio if row.whole else torch.zeros_like(ratio),
                    )

    def _read(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, LowerOutput]:
        """Pads texts on the right, (B, T), for which a causal model needs no mask, and runs the lower layers."""
        tokens = pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(self.device)
        return tokens, self.model.lower_layers(tokens)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates each text under its own plans. A repeated prompt gets different plans."""
        self._generated.clear()
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: object) -> Tensor:
        mask = cast(Tensor, kwargs.get("attention_mask", torch.ones_like(context)))
        prompts = [row[is_token].tolist() for row, is_token in zip(context, mask.bool(), strict=True)]
        keys = []
        for prompt in prompts:
            times = self._generated[tuple(prompt)]
            self._generated[tuple(prompt)] += 1
            keys.append([*prompt, -times] if times else prompt)
        tokens, lower = self._read(prompts)
        count = plans_for(self.model.config.plan_span, max_length - 1)  # the last token is never read
        plans, _ = self._plans.sample(lower, tokens, [len(prompt) for prompt in prompts], keys, count, 1)
        return super()._model_generate(context, max_length, stop, plan=plans[0], prior=self.prior, **kwargs)


def _grouped(requests: Sequence[Request]) -> list[tuple[list[int], list[int], list[int]]]:
    """
    Groups requests that differ only in the last token, the longest first. Returns the indices of each group's requests,
    and the prompt and continuation of the first.
    """
    together: dict[tuple[bool, tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for index, (strings, prompt, continuation) in enumerate(requests):
        together[strings is None, tuple(prompt), tuple(continuation[:-1])].append(index)
    groups = [(indices, requests[indices[0]][1], requests[indices[0]][2]) for indices in together.values()]
    groups.sort(key=lambda group: (-len(group[1]) - len(group[2]), group[1] + group[2]))
    return groups


def model_folder(folder: Path) -> str:
    """
    Returns the model's folder inside the folder of a run. Other folders are returned as absolute paths, so that they
    are not looked up on the hub, and other names unchanged.
    """
    if not folder.is_dir():
        return str(folder)
    trained = folder / "model"
    has_own = (folder / "config.json").is_file() or not (trained / "config.json").is_file()
    return str((folder if has_own else trained).resolve())
