"""Help of `free-transformer train`: common settings, then the settings of each section."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperCommand

from free_transformer.cli.output import console

if TYPE_CHECKING:
    from free_transformer.settings import SettingDescription


class TrainCommand(TyperCommand):
    """Shows all settings after the options. Imports them only when help is requested."""

    def format_help(self, *args: Any) -> None:  # the names of click's classes differ between versions of typer
        from free_transformer.settings import common_settings, describe_settings

        super().format_help(*args)
        _print_settings("Common settings, as SECTION.NAME=VALUE", common_settings())
        for section, described in describe_settings().items():
            _print_settings(f"Settings: {section}", described)


def _print_settings(title: str, described: "Sequence[SettingDescription]") -> None:
    entries: list[RenderableType] = []
    for each in described:
        entries.append(Text.assemble((each.name, "bold cyan"), f" = {each.default}"))
        entries.append(Padding(each.text.replace("`", ""), (0, 0, 0, 4)))
    console.print(Panel(Group(*entries), title=title, title_align="left", border_style="dim"))
