"""
`lm-evaluation-harness` on a Free Transformer: likelihoods averaged over plans, texts written under drawn ones.

A continuation has the likelihood that this library's own writing gives it,

    log 1/S sum_s p(continuation | prompt, Z_s).

The plans `Z_s` of the prompt's tokens are read from the prompt alone by the encoder, or drawn from the prior, and those
of the tokens that follow come from the prior, as in `generate`. The encoder never reads a continuation: it would have
read the answer. A whole document (`loglikelihood_rolling`) has no prompt; its likelihood is the importance-weighted
bound of `evaluate_likelihood`.

Where plans have no effect (R = 0, a converted Llama) all is computed as the Llama computes it, and the scores are those
of the harness's `hf`, to the bit.
"""

import hashlib
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from free_transformer.errors import SettingsError
from free_transformer.files import first_line
from free_transformer.model.layout import num_plans as plans_of
from free_transformer.model.layout import plan_layout
from free_transformer.model.modeling import FreeTransformer, LowerOutput
from free_transformer.model.plan import PlanPrior
from free_transformer.model.sampling import PROMPT_PLANS, check_choice

logger = logging.getLogger(__name__)
MACHINE = "pretty_env_info"  # of the harness's results: a page about the computer and what is installed there


@dataclass
class Row:
    """A text of a batch, whose end is a continuation to score, and what has been found under the plans so far."""

    prompt: list[int]
    text: list[int]  # prompt and continuation, cut on the left to what the model can read
    targets: Tensor  # (M, N): M continuations that differ in their last token alone
    whole: bool  # a document that is scored as one, with next to no prompt
    values: list[Tensor]  # log-likelihoods of the continuations under each plan, (M,)
    probabilities: Tensor | None = None  # of the next token, (N, V), summed over plans that what came before weighs
    highest: Tensor | None = None  # (N, 1), the largest logarithm of such a weight, which all are divided by

    @property
    def start(self) -> int:
        """The token that the continuation's first one is predicted from."""
        return len(self.text) - self.targets.shape[1] - 1

    def add(self, log_probs: Tensor, log_weight: Tensor) -> None:
        """What one more plan says of the continuation's tokens, (N, V)."""
        of_tokens = [log_probs.gather(1, target[:, None])[:, 0] for target in self.targets]
        self.values.append(torch.stack([each.sum() for each in of_tokens]).double() + log_weight)
        if self.whole:  # nobody asks what a document's likeliest tokens are
            return
        weight = F.pad(of_tokens[0][:-1].double().cumsum(0), (1, 0))[:, None]
        probabilities = log_probs.float().exp()
        if self.probabilities is None or self.highest is None:
            self.probabilities, self.highest = probabilities, weight
            return
        highest = torch.maximum(self.highest, weight)
        self.probabilities *= (self.highest - highest).exp().float()
        self.probabilities += probabilities * (weight - highest).exp().float()
        self.highest = highest

    def answers(self) -> list[tuple[float, bool, float]]:
        """Of each continuation its log-likelihood, whether each token of it is the likeliest, and the error."""
        means, errors = log_mean_exp(torch.stack(self.values))
        greedy = [False] * len(means)
        if self.probabilities is not None:
            greedy = (self.probabilities.argmax(-1) == self.targets).all(-1).tolist()
        return list(zip(means.tolist(), greedy, errors.tolist(), strict=True))


def log_mean_exp(values: Tensor) -> tuple[Tensor, Tensor]:
    """
    `log mean_s exp(values[s])` of S draws, (S, ...) -> (...), and its standard error by the delta method, NaN for one.

    Where all draws are equal it is that value, to the bit.
    """
    highest = values.amax(0)
    weights = (values - highest).exp()
    mean = weights.mean(0)
    spread = weights.std(0) if len(values) > 1 else torch.full_like(mean, math.nan)
    return highest + mean.log(), spread / (math.sqrt(len(values)) * mean)


@register_model("free-transformer")
class PlanHarnessLM(HFLM):
    """
    `lm_eval`'s `hf` for Free Transformers.

    The plans of a request follow from `plan_seed` and its prompt alone: neither the batch nor other requests change
    them, and the choices of a question are judged under the same plans.

    Args:
        pretrained: a model, given with its `tokenizer`, or a folder: of a run, of a model, or of a plain Llama.
        num_plans: S, plans that a likelihood is averaged over. Texts are written under one.
        prompt_plan: `"posterior"`, the encoder reads the prompt, or `"prior"`. Whole documents are read in the same
            way: plans from the prior need no weights, and give a looser bound.
        prior: what other plans are drawn from, `"uniform"` or `"aggregate"`.
        plan_seed: of the plans.
        kwargs: as for `HFLM`; `device` is by default the GPU where there is one.

    Raises:
        ValueError: for values other than those, and models that have no plan.
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
        **kwargs: Any,
    ):
        if num_plans < 1:
            raise ValueError(f"num_plans={num_plans}: at least 1")
        check_choice("prompt_plan", prompt_plan, PROMPT_PLANS)
        if isinstance(pretrained, str | Path):
            pretrained = model_folder(Path(pretrained))
        elif not hasattr(pretrained, "infer_plan"):
            raise ValueError(f"pretrained is a {type(pretrained).__name__}: a FreeTransformer or a folder is needed")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, backend="causal", device=device, **kwargs)
        self.num_plans = num_plans
        self.prompt_plan = prompt_plan
        self.prior = self.model.plan_prior.checked(prior)
        self.plan_seed = plan_seed
        self._neutral = not bool(self.model.plan_table.weight.any())
        # Plans are drawn on the CPU, where more of them from one seed begin as fewer do; on a GPU they do not.
        self._plan_prior = PlanPrior(self.model.config.latent_dim)
        self._plan_prior.load_state_dict(self.model.plan_prior.state_dict())
        self.standard_errors: dict[str, list[float]] = defaultdict(list)  # by task, of each request
        self._errors: list[float] = []  # of the call at work, in the order of its requests or windows
        self._written: Counter[tuple[int, ...]] = Counter()  # how often each prompt was written to

    def get_model_info(self) -> dict[str, Any]:
        """
        Also how plans were drawn, and `plan_standard_errors`: of the log-likelihoods, in nats, from the spread over
        plans; the mean over the requests of each task.
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
        """Documents longer than the model reads are cut into windows, as by `hf`, each with plans of its own."""
        self._errors.clear()
        answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        errors = iter(self._errors)
        for request in requests:
            windows = -(-len(self.tok_encode(*request.args)) // self.max_length)
            self.standard_errors[request.task_name or ""].append(math.hypot(*islice(errors, windows)))
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """
        As `HFLM` does: the longest first, and what differs in its last token alone read once.

        Args:
            requests: of the strings, the prompt's tokens and the continuation's; without strings it is a document.
        """
        together: dict[Any, list[int]] = defaultdict(list)
        for index, (strings, prompt, continuation) in enumerate(requests):
            together[strings is None, tuple(prompt), tuple(continuation[:-1])].append(index)
        rows = [(indices, *requests[indices[0]][1:]) for indices in together.values()]
        rows.sort(key=lambda row: (-len(row[1]) - len(row[2]), row[1] + row[2]))
        detects = self.batch_size == "auto" and not override_bs and bool(rows)
        if detects:
            self.batch_sizes: dict[int, int] = {}
        size = (override_bs or 0) if self.batch_size == "auto" else self.batch_size
        found: list[Any] = [None] * len(requests)
        hidden = disable_tqdm or self.rank != 0 or override_bs is not None  # documents come a batch at a time
        progress = tqdm(total=len(requests), disable=hidden, desc="log-likelihoods")
        for chunk in Collator.get_chunks(rows, n=size, fn=self._batch_scheduler if detects else None):
            batch = [self._row([requests[index] for index in indices]) for indices, *_ in chunk]
            self._score(batch)
            for (indices, *_), row in zip(chunk, batch, strict=True):
                for index, answer in zip(indices, row.answers(), strict=True):
                    found[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer[:2])
                progress.update(len(indices))
        progress.close()
        self._errors += [error for _, _, error in found]
        return [(value, greedy) for value, greedy, _ in found]

    def _row(self, requests: list[Any]) -> Row:
        strings, prompt, continuation = requests[0]
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens: this model reads at most {self.max_length}"
            )
        text = prompt + continuation
        if len(text) > self.max_length + 1:
            logger.warning(
                "%d tokens: cut on the left to %d, the most that this model reads", len(text), self.max_length
            )
        targets = torch.tensor([continuation for _, _, continuation in requests], device=self.device)
        return Row(prompt, text[-(self.max_length + 1) :], targets, strings is None, [])

    def _score(self, batch: list[Row]) -> None:
        """Reads the texts once up to the plan, and once more from there under each plan."""
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, mixed, enabled=mixed is not None):
            inputs, lower = self._read([row.text[:-1] for row in batch])  # no token is predicted from the last one
            ends = [len(row.text) - 1 if row.whole else row.start + 1 for row in batch]
            keys = [row.text if row.whole else row.prompt for row in batch]
            count = plans_of(self.model.config.plan_span, inputs.shape[1])
            plans, log_ratios = self._draw(lower, inputs, ends, keys, count, self.num_plans)
            first = 0 if self._neutral else min(row.start for row in batch)
            columns = torch.arange(first, inputs.shape[1], device=inputs.device)
            for of_plan, ratios in zip(plans, log_ratios, strict=True):
                logits = self.model.upper_layers(lower, of_plan, logits_to_keep=columns)
                log_probs = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
                for row, of_row, ratio in zip(batch, log_probs, ratios, strict=True):
                    row.add(
                        of_row[row.start - first : len(row.text) - 1 - first],
                        ratio if row.whole else torch.zeros_like(ratio),
                    )

    def _read(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, LowerOutput]:
        """Texts padded on the right, (B, T), which a causal model needs no mask for; and their first lower."""
        inputs = pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(self.device)
        return inputs, self.model.lower_layers(inputs)

    def _draw(
        self,
        lower: LowerOutput,
        inputs: Tensor,
        ends: Sequence[int],
        keys: Sequence[Sequence[int]],
        count: int,
        draws: int,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            ends: how many tokens of each text the encoder may read.
            keys: what the random numbers of each text follow from.
            count: P, plans of a text.
            draws: S.

        Returns:
            plans, (S, B, P, H) bool, and `log p(z) - log q(z)` of those that were read from the text, (S, B).
        """
        span, config = self.model.config.plan_span, self.model.config
        reads = self._reads(inputs, ends)
        logits = self._posterior(lower, ends).cpu() if any(reads) else None
        plans, ratios = [], []
        for row, (end, key, reads_row) in enumerate(zip(ends, keys, reads, strict=True)):
            stream = torch.Generator().manual_seed(_seed(self.plan_seed, key))
            drawn = torch.empty(0, draws, config.latent_dim, dtype=torch.bool)  # plan after plan
            ratio = torch.zeros(draws, dtype=torch.float64)
            if logits is not None and reads_row:
                of_row = logits[row, : plans_of(span, end), None].expand(-1, draws, -1)
                drawn = self.model.plan_mapper(of_row, stream)
                log_q = F.logsigmoid(torch.where(drawn, of_row, -of_row)).sum(-1)
                ratio = (self._plan_prior.log_prob(drawn, self.prior) - log_q).sum(0)
            if len(drawn) < count:
                rest = self._plan_prior.sample(count - len(drawn), draws, self.prior, stream)
                drawn = torch.cat([drawn, rest])
            plans.append(drawn.transpose(0, 1))
            ratios.append(ratio)
        return torch.stack(plans, 1).to(self.device), torch.stack(ratios, 1).to(self.device)

    def _reads(self, inputs: Tensor, ends: Sequence[int]) -> list[bool]:
        """Which texts the encoder reads: none where plans have no effect, nor what is nothing but a beginning."""
        if self.prompt_plan == "prior" or self._neutral:
            return [False] * len(ends)
        return [bool((row[:end] != self.prefix_token_id).any()) for row, end in zip(inputs, ends, strict=True)]

    def _posterior(self, lower: LowerOutput, ends: Sequence[int]) -> Tensor:
        """Logits of the plans of the first `ends` tokens of each text, (B, P, H), in double precision."""
        assert lower.layout is not None
        positions = lower.layout.position_ids
        seen = torch.arange(positions.shape[1], device=self.device) < torch.tensor(ends, device=self.device)[:, None]
        layout = plan_layout(self.model.config.plan_span, positions, seen, packed=False)
        return self.model.encode(replace(lower, layout=layout)).double()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each text under plans of its own; a prompt that comes again gets others."""
        self._written.clear()
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        real = kwargs.get("attention_mask", torch.ones_like(context)).bool()
        prompts = [row[mask].tolist() for row, mask in zip(context, real, strict=True)]
        keys = []
        for prompt in prompts:
            times = self._written[tuple(prompt)]
            self._written[tuple(prompt)] += 1
            keys.append([*prompt, -times] if times else prompt)
        inputs, lower = self._read(prompts)
        count = plans_of(self.model.config.plan_span, max_length - 1)  # the last token is never read
        plans, _ = self._draw(lower, inputs, [len(prompt) for prompt in prompts], keys, count, 1)
        return super()._model_generate(context, max_length, stop, plan=plans[0], prior=self.prior, **kwargs)


def _seed(seed: int, tokens: Sequence[int]) -> int:
    digest = hashlib.blake2b(repr((seed, list(tokens))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def model_folder(folder: Path) -> str:
    """The model's folder of a run's; any other name as it is, a folder's in full, so that no hub is asked for it."""
    if not folder.is_dir():
        return str(folder)
    trained = folder / "model"
    has_own = (folder / "config.json").is_file() or not (trained / "config.json").is_file()
    return str((folder if has_own else trained).resolve())


def run_tasks(
    lm: HFLM,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
    gen_kwargs: str | None = None,
) -> dict[str, Any]:
    """
    `lm_eval.simple_evaluate`, its result in what JSON can hold (the rest null), without the page on the computer.

    Args:
        lm: a `PlanHarnessLM`, or the harness's own `HFLM`.
        tasks: names of tasks, groups or tags, patterns of such, and YAML files.
        include_path: a folder of YAML files with further tasks.
        limit: items of each task, or a share of them under 1.
        gen_kwargs: changes to how texts are written, as in `temperature=0.8,do_sample=True`.

    Raises:
        SettingsError: for tasks that are not known or cannot be run.
    """
    manager = _task_manager(tasks, include_path)
    names = find_tasks(manager, tasks)
    try:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            batch_size=lm.batch_size,
            limit=limit,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            gen_kwargs=gen_kwargs,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (SettingsError, OSError, RuntimeError):
        raise
    except Exception as error:  # a task is a program: what it can do wrong has no common kind
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SettingsError(f"tasks {', '.join(tasks)}: lm_eval cannot run them ({reason})") from error
    kept = {name: value for name, value in (results or {}).items() if name != MACHINE}
    return json.loads(json.dumps(kept, default=handle_non_serializable), parse_constant=lambda _: None)


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """With the harness's own tasks only where they may be meant: to read those takes ten seconds."""
    if include_path is None:
        return TaskManager()
    if not Path(include_path).is_dir():
        raise SettingsError(f"include path {include_path}: not a folder; name one that holds YAML files of tasks")
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    if set(tasks) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=str(include_path))


def find_tasks(manager: TaskManager, wanted: Iterable[str]) -> list[str]:
    """The names that are meant, each once; `SettingsError` with the nearest where there is none."""
    found: dict[str, None] = {}
    for name in wanted:
        matches = manager.match_tasks([name])
        if not matches and name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise SettingsError(f"task {name}: no such file")
            matches = [str(Path(name).resolve())]
        if not matches:
            near = get_close_matches(name, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists what there is"
            raise SettingsError(f"task {name!r}: there is none of this name; {hint}")
        found |= dict.fromkeys(matches)
    if not found:
        raise SettingsError("no tasks: name some, as in --tasks lambada_openai,arc_easy")
    return list(found)


def result_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what `run_tasks` returns, a metric a row; `± nats` is the error of a request's likelihood."""
    config = results["config"]
    plans, errors = config.get("num_plans"), config.get("plan_standard_errors", {})
    header = ["task", "items", "metric", "value"] + (["plans", "± nats"] if plans is not None else [])
    rows = []
    for task, values in results["results"].items():
        items = results.get("n-samples", {}).get(task, {}).get("effective", "")
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
            row = [task, str(items), shown, _number(value)]
            error = _number(values.get(f"{metric}_stderr,{filter_name}"))
            row[-1] += f" ± {error}" if error else ""
            if plans is not None:  # texts are written under one plan each
                row += [str(plans if task in errors else 1), _number(errors.get(task))]
            rows.append(row)
    return header, rows


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else ""
