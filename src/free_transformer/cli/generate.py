"""`free-transformer generate`."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli.options import ModelArgument, PlanStrengthOption, PriorOption, PromptPlanOption, SeedOption
from free_transformer.errors import InputError
from free_transformer.model.sampling import Sampling


def generate(
    run: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue. Default: none.")] = "",
    plan: Annotated[
        str | None,
        typer.Option(
            help="Plan: its bits, bit 0 first, such as 01101001; the concatenated bits of several plans; or the name "
            "of a plan. Default: sampled."
        ),
    ] = None,
    plan_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKENS:PLAN",
            help="Plan to use after a number of new tokens, such as 2000:10010110; can be repeated. Default: none.",
        ),
    ] = None,
    plan_from: Annotated[
        Path | None,
        typer.Option(
            help="Text file whose most likely plan is used. Of a long file, several windows are read. Default: none."
        ),
    ] = None,
    prompt_plan: PromptPlanOption = "posterior",
    prior: PriorOption = "uniform",
    plans: Annotated[
        str,
        typer.Option(
            help="Sampling of the plans of several texts: independent, or stratified (spread evenly over the "
            "distribution that they are sampled from)."
        ),
    ] = "independent",
    plan_strength: PlanStrengthOption = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Number of texts, at least 1.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens, at least 1.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature, from 0 (the most likely token) to 100.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from this many most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens with this total probability, 0 to 1.")
    ] = 1.0,
    stream: Annotated[
        bool, typer.Option(help="Print the text while it is generated; only with --num-samples 1.")
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """
    Generate text with sampled plans, a given plan, or the plan of an example.

    Examples:

    - `free-transformer generate runs/my-run --prompt "Once upon"`
    - `free-transformer generate runs/my-run --plan 01101001 --num-samples 4`
    - `free-transformer generate runs/my-run --plan 01101001 --plan-change 2000:10010110 --max-new-tokens 4000`
    - `free-transformer generate runs/my-run --plan-from example.txt`
    - `free-transformer generate runs/my-run --num-samples 8 --plans stratified`
    """
    from free_transformer.cli.generation import Request, plan_changes
    from free_transformer.runtime.sessions import EXPORT_FILE

    if plan is not None and plan_from is not None:
        raise InputError("give either --plan or --plan-from, not both")
    if stream and num_samples > 1:
        raise InputError("--stream shows one text: use --num-samples 1")
    request = Request(
        prompt=prompt,
        plan=plan,
        plan_changes=plan_changes(plan_change or []),
        plan_from=plan_from,
        prompt_plan=prompt_plan,
        prior=prior,
        plans=plans,
        plan_strength=plan_strength,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        stream=stream,
        seed=seed,
    )
    if (run / EXPORT_FILE).is_file():  # without torch
        from free_transformer.cli.generation_onnx import generate_with_onnx

        generate_with_onnx(run, request)
    else:
        from free_transformer.cli.generation_torch import generate_with_torch

        generate_with_torch(run, request)
