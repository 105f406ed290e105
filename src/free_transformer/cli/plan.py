"""`free-transformer plan`."""

from typing import TYPE_CHECKING, Annotated

import typer

from free_transformer.cli.options import BatchOption, DataOption, RunArgument, SeedOption
from free_transformer.cli.output import print_line, print_sample, print_table
from free_transformer.errors import InputError
from free_transformer.reporting.console import stderr_console
from free_transformer.reporting.table import Table

if TYPE_CHECKING:
    from free_transformer.evaluation import BitEffect


def plan(
    run: RunArgument,
    data: DataOption = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan whose bits are flipped in the samples. Default: sampled from the prior.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text that the samples continue. Default: none.")] = "",
    max_rows: Annotated[
        int, typer.Option(min=1, help="Maximum number of held-out rows on which the effect is measured.")
    ] = 64,
    batch_size: BatchOption = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens per sample.")] = 80,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature, from 0 (the most likely token) to 100.")
    ] = 0.8,
    seed: SeedOption = 0,
) -> None:
    """
    Show how flipping each bit of the plan changes the next-token distribution, with a sample for each value, and which
    bits carry no information.

    Examples:

    - `free-transformer plan runs/my-run`
    - `free-transformer plan runs/my-run --prompt "Once upon"`
    """
    import torch
    from rich.progress import track

    from free_transformer.cli.prompts import prompt_tokens
    from free_transformer.evaluation import bit_effects
    from free_transformer.evaluation.plan_ops import set_bits
    from free_transformer.export.load import load_with_tokenizer
    from free_transformer.model.layout import num_plans
    from free_transformer.model.modeling import FreeTransformer
    from free_transformer.model.plan_text import format_plan, parse_plan
    from free_transformer.runs.run import Run

    model, tokenizer = load_with_tokenizer(run)
    if not isinstance(model, FreeTransformer):
        raise InputError(f"{run}: a baseline has no plan; give the run of a Free Transformer")
    given = None if plan is None else parse_plan(plan, model.config.latent_dim, model.config.plan_names)
    rows = Run.open(run).held_out_rows(tokenizer, data).sample(max_rows, seed)
    num_batches = -(-len(rows) // batch_size)
    batches = track(rows.in_order(batch_size), "flipping bits", total=num_batches, console=stderr_console())
    effects = sorted(bit_effects(model, batches), key=lambda effect: -effect.effect)
    torch.manual_seed(seed)
    tokens = prompt_tokens(tokenizer, prompt)
    if given is None:
        given = model.sample_plan(1, num_plans(model.config.plan_span, tokens.shape[1] + max_new_tokens))[0]
    _print_effects(effects)
    for effect in effects:
        for value in (0, 1):
            bits = set_bits(given, {effect.bit: value})
            torch.manual_seed(seed)  # so that samples differ only in the bit
            sequences = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                plan=bits,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
            )
            text = tokenizer.decode(sequences[0], skip_special_tokens=True)
            print_sample(f"bit {effect.bit} = {value}, plan {format_plan(bits)}", text)


def _print_effects(effects: "list[BitEffect]") -> None:
    header = ["bit", "KL, bits", "effect, nats per token", "state"]
    rows = [
        [
            *(str(each.bit), f"{each.spent:.3f}", f"{each.effect:.4f} ± {each.standard_error:.4f}"),
            "live" if each.dead is None else f"dead: {each.dead}",
        ]
        for each in effects
    ]
    print_table(Table(header, rows))
    dead = sum(each.dead is not None for each in effects)
    if dead:
        print_line(f"{dead} of {len(effects)} bits carry no information about the text")
