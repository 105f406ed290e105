"""Renders prompts from chat messages with the tokenizer's chat template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from free_transformer.errors import InputError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _GenerationBlock(Extension):
    """`{% generation %}` marks the part of a conversation that models are trained on. Rendering outputs its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """
    A Jinja chat template, as in `transformers`, but rendered without that package, so that a server of an ONNX export
    does not need it.

    Args:
        template: source text of the template.
        special_tokens: special tokens by name, such as `{"bos_token": "<s>"}`.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, object]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise InputError(f"the tokenizer's chat template cannot be read: {error}") from error
        self.special_tokens = {name: str(special_tokens[name]) for name in SPECIAL_TOKENS if special_tokens.get(name)}

    @classmethod
    def of(cls, template: object, special_tokens: Mapping[str, object]) -> "ChatTemplate | None":
        """Creates a template from a tokenizer's setting: a template, named templates with a `default`, or None."""
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}
        if isinstance(template, dict):
            template = template.get("default")
        return cls(cast(str, template), special_tokens) if template else None

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """Creates a template from the files of a tokenizer in a folder, if it has one."""
        settings: dict[str, object] = {}
        if (file := folder / "tokenizer_config.json").is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
        template = settings.get("chat_template")
        if (file := folder / "chat_template.jinja").is_file():
            template = file.read_text(encoding="utf-8")
        tokens = {
            name: token["content"] if isinstance(token := settings[name], dict) else token
            for name in SPECIAL_TOKENS
            if settings.get(name)
        }
        return cls.of(template, tokens)

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """Returns the text that the model continues. Raises `ValueError` for messages that the template rejects."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self.special_tokens)
        except Exception as error:  # a template is a program: its errors have no common class
            raise InputError(f"messages: the model's chat template rejects them ({error})") from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
