"""`free-transformer lm-eval`."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli.options import ModelArgument, OverwriteOption, PriorOption, PromptPlanOption
from free_transformer.cli.output import print_line, print_table
from free_transformer.cli.packages import optional_packages
from free_transformer.files import WRITTEN_BY, check_own_file, write_json


def lm_eval(
    run: ModelArgument,
    tasks: Annotated[
        list[str],
        typer.Option(help="Task names separated by commas, patterns, or YAML files; can be repeated."),
    ],
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder of YAML files with further tasks. Default: none.", metavar="FOLDER"),
    ] = None,
    num_plans: Annotated[
        int, typer.Option(min=1, help="Number of plans over which likelihoods are averaged, at least 1.")
    ] = 16,
    prompt_plan: PromptPlanOption = "posterior",
    prior: PriorOption = "uniform",
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Number of examples before each question. Default: the task's own."),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="Number of items per task, or a fraction of them if less than 1. Default: all."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of texts per batch, at least 1.")] = 8,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(help="Generation settings, such as temperature=0.8,do_sample=True. Default: the task's own."),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Apply the tokenizer's chat template to the prompts.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="File of the results. Default: RUN/lm_eval.json.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of plans, texts and few-shot examples, from 0 to 2^32 - 1.")
    ] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Run tasks of lm-evaluation-harness. Likelihoods are averaged over plans; a baseline is evaluated as usual.

    Examples:

    - `free-transformer lm-eval runs/my-run --tasks lambada_openai,arc_easy --limit 100`
    """
    with optional_packages("tasks need", "lm-eval"):
        from lm_eval.models.huggingface import HFLM

        from free_transformer.integrations.harness import PlanHarnessLM, result_table, run_tasks
    from free_transformer.distributed.processes import find_device
    from free_transformer.export.load import load_with_tokenizer
    from free_transformer.model.modeling import FreeTransformer
    from free_transformer.runs.run import check_folder_of_run

    check_folder_of_run(run)
    file = output or run / "lm_eval.json"
    check_own_file(file, overwrite)
    model, tokenizer = load_with_tokenizer(run)
    model = model.to(find_device("auto"))
    has_plan = isinstance(model, FreeTransformer)
    if has_plan:
        lm = PlanHarnessLM(
            model, num_plans, prompt_plan, prior, plan_seed=seed, tokenizer=tokenizer, batch_size=batch_size
        )
    else:
        lm = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    names = [name.strip() for each in tasks for name in each.split(",") if name.strip()]
    results = run_tasks(lm, names, include_path, num_fewshot, limit, seed, apply_chat_template, gen_kwargs)
    write_json(file, {"written_by": WRITTEN_BY, **results})
    print_table(result_table(results))
    if has_plan:
        print_line("± nats is the standard error of a request's log-likelihood over plans")
    print_line(f"saved to {file}")
