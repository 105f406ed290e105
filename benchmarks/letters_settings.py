"""
The letters task with other settings: are the paper's results reproduced at 1/8 and at 1 bit per token?

Each line changes one setting of `free-transformer reproduce letters`: size, steps, initialization of the encoder's
readout, schedule, span, bits of a plan, aggregate term. `make letters-settings`: 50 minutes on 2 cores for one seed.
Results are kept in `--out`. A plan of 8 tokens has the bits of its 8 tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from free_transformer.data.letters import NOISE
from free_transformer.reproduce.letters import Result, Variant, reproduce_letters

FREE_BITS = (1 / 8, 1.0)
BITS = " bit per token, "


def changes(steps: int, other_free_bits: float) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name of each change, with its model and training settings."""
    return {
        "as reproduced": ({}, {}),
        "twice the steps": ({}, {"max_steps": 2 * steps}),
        "width 128": ({"hidden_dim": 128}, {}),
        "readout at full scale": ({"readout_init_scale": 1.0}, {}),
        "KL weight annealed up": ({}, {"kl_schedule": "linear"}),
        "free bits annealed": ({}, {"free_bits_schedule": "linear", "free_bits_start": other_free_bits}),
        "a plan of 8 tokens": ({"plan_span": 8}, {}),
        "H = 2": ({"latent_dim": 2}, {}),
        "aggregate_weight 1": ({"aggregate_weight": 1.0}, {}),
    }


def variants(steps: int) -> list[Variant]:
    """Every change at each of the free bits."""
    found = []
    for free_bits, other in (FREE_BITS, FREE_BITS[::-1]):
        for number, (name, (model, training)) in enumerate(changes(steps, other).items()):
            model = {"plan_span": 1, "latent_dim": 8, **model}
            model["free_bits"] = free_bits * model["plan_span"]
            title = f"{'1/8' if free_bits < 1 else '1'}{BITS}{name}"
            found.append(Variant(f"{free_bits:g}-{number}", title, model, training))
    return found


def main(
    out: Annotated[Path, typer.Option(help="folder of the models and the results")] = Path("runs/letters_settings"),
    only: Annotated[str, typer.Option(help="parts of the titles to run, separated by semicolons (default: all)")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="number of runs of each")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 900,
    processes: Annotated[int, typer.Option(min=1, help="number of models at a time, one thread each")] = 2,
    groups: Annotated[int, typer.Option(min=1, help="groups of 16 strings that each model generates")] = 64,
) -> None:
    """Trains the missing runs and prints the table."""
    known = variants(steps)
    tried = [each for each in known if any(part in each.title for part in only.split(";"))]
    if not tried:
        titles = "; ".join(each.title for each in known)
        raise typer.BadParameter(f"only={only!r}: no title contains it; titles are {titles}")
    print(table(reproduce_letters(out, seeds, steps, processes, groups, tried), tried))


def table(results: Sequence[Result], tried: Sequence[Variant]) -> str:
    """A value for each seed. Place and noise with a shared plan are relative to independent plans."""
    lines = ["| plan | changed | place, shared / independent | noise, shared / independent | valid | rate of `!` |"]
    lines.append("|---" * 6 + "|")
    for variant in tried:
        here = [result for result in results if result.variant == variant.name]
        pairs = [(each.shared, each.independent) for each in here if each.shared]
        columns = [
            [f"{shared.place_std / alone.place_std:.2f}" for shared, alone in pairs],
            [f"{shared.noise_overlap / max(alone.noise_overlap, 1e-9):.2f}" for shared, alone in pairs],
            [f"{alone.valid:.3f}" for _, alone in pairs],
            [f"{alone.noise_rate / NOISE:.1f}" for _, alone in pairs],
        ]
        cells = [*variant.title.split(BITS), *(", ".join(values) for values in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
