"""Prompts from chat messages, by the tokenizer's chat template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from free_transformer.errors import InputError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _GenerationBlock(Extension):
    """`{% generation %}` marks what a model learns of a conversation, and writes what it contains."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """
    Templates are Jinja, as `transformers` reads them; they are rendered without it, since an ONNX export is served
    where it is not installed.

    Args:
        template: the source. A dictionary of several is by name, and `default` is used.
        special_tokens: by name, as in `{"bos_token": "<s>"}`.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, Any]):
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
    def of(cls, template: Any, special_tokens: Mapping[str, Any]) -> "ChatTemplate | None":
        """Of what a tokenizer has: a template, several by name, or none."""
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}
        if isinstance(template, dict):
            template = template.get("default")
        return cls(template, special_tokens) if template else None

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """Of the tokenizer that was saved in a folder."""
        settings: dict[str, Any] = {}
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

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the model continues. `ValueError` for messages that the template refuses."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self.special_tokens)
        except Exception as error:  # a template is a program: its errors have no common class
            raise InputError(f"messages: the model's chat template refuses them ({error})") from error


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)
