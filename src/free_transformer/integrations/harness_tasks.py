"""Runs tasks of `lm-evaluation-harness` and tabulates their results."""

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypedDict

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from free_transformer.errors import SettingsError
from free_transformer.files import first_line
from free_transformer.reporting.table import Table

MACHINE = "pretty_env_info"  # key of the harness's results: a description of the computer and its packages


class ModelInfo(TypedDict, total=False):
    """Part of the results' `config`; a plain Llama has no plans."""

    num_plans: int
    prompt_plan: str
    prior: str
    plan_seed: int
    plan_standard_errors: dict[str, float]


Results = TypedDict(
    "Results",
    {
        "results": dict[str, dict[str, float | str | None]],
        "config": ModelInfo,
        "n-samples": dict[str, dict[str, int]],
        "n-shot": dict[str, int],
        "versions": dict[str, float | str],
    },
)


def run_tasks(
    lm: HFLM,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
    gen_kwargs: str | None = None,
) -> Results:
    """
    Runs `lm_eval.simple_evaluate` and returns its results as JSON values, without the description of the computer.
    Values that JSON cannot represent are None.

    Args:
        lm: a `PlanHarnessLM`, or the harness's own `HFLM`.
        tasks: names of tasks, groups or tags, patterns of names, and YAML files.
        include_path: a folder with YAML files of additional tasks.
        limit: number of items per task, or a share of them if below 1.
        gen_kwargs: generation options, for example `temperature=0.8,do_sample=True`.

    Raises:
        SettingsError: for tasks that are unknown or cannot be run.
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
    except Exception as error:  # tasks contain code, which may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SettingsError(f"tasks {', '.join(tasks)}: lm_eval cannot run them ({reason})") from error
    kept = {name: value for name, value in (results or {}).items() if name != MACHINE}
    return json.loads(json.dumps(kept, default=handle_non_serializable), parse_constant=lambda _: None)


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """Includes the harness's own tasks only if they may be requested, since reading them takes ten seconds."""
    if include_path is None:
        return TaskManager()
    if not Path(include_path).is_dir():
        raise SettingsError(f"include path {include_path}: not a folder; name a folder with YAML files of tasks")
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    if set(tasks) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=str(include_path))


def find_tasks(manager: TaskManager, wanted: Iterable[str]) -> list[str]:
    """
    Returns the names of the wanted tasks, without duplicates.

    Raises:
        SettingsError: for a name that matches no task; the message suggests similar names.
    """
    found: dict[str, None] = {}
    for name in wanted:
        matches = manager.match_tasks([name])
        if not matches and name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise SettingsError(f"task {name}: no such file")
            matches = [str(Path(name).resolve())]
        if not matches:
            near = get_close_matches(name, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists all tasks"
            raise SettingsError(f"task {name!r}: there is no task of this name; {hint}")
        found |= dict.fromkeys(matches)
    if not found:
        raise SettingsError("no tasks: name some, as in --tasks lambada_openai,arc_easy")
    return list(found)


def result_table(results: Results) -> Table:
    """
    Returns a table of results, one row per metric. The column `± nats` has the standard error of a request's
    log-likelihood.
    """
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
            if plans is not None:  # each generated text has one plan
                row += [str(plans if task in errors else 1), _number(errors.get(task))]
            rows.append(row)
    return Table(header, rows)


def _number(value: float | str | None) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else ""
