"""The user's choices on the page, which can be exported as a link, Python code or a server request."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlencode

import numpy as np

from free_transformer.errors import InputError
from free_transformer.model.plan_text import format_bits, parse_bits
from free_transformer.serving.batch import Batch

TABS = ("grid", "flip", "read", "map", "lane")
MAX_LENGTH = 1000
MAX_PROMPT = 20_000  # characters
TEMPERATURES = (0.0, 2.0)


@dataclass(frozen=True)
class Choices:
    """
    Attributes:
        plan: bits of the plan, or of several plans separated by spaces.
        words: seed of the random numbers of the words; others: seed of the other plans of the grid.
    """

    prompt: str = ""
    plan: str = ""
    words: int = 0
    others: int = 0
    temperature: float = 0.7
    length: int = 200
    tab: str = "grid"

    def checked(self, batch: Batch) -> "Choices":
        """
        Returns these choices with a normalized plan and numbers clipped to their limits.

        Raises:
            InputError: for a plan that does not match the model, and a prompt that is too long.
        """
        if len(self.prompt) > MAX_PROMPT:
            raise InputError(f"prompt: {len(self.prompt):,} characters; at most {MAX_PROMPT:,}")
        plans = parse_bits(self.plan, batch.latent_dim, batch.plan_names)
        if batch.plan_span == "sequence" and len(plans) > 1:
            raise InputError(f"plan: {len(plans)} plans; this model has one plan per text")
        return replace(
            self,
            plan=format_bits(plans),
            words=abs(int(self.words)) % 2**31,
            others=abs(int(self.others)) % 2**31,
            temperature=min(max(float(self.temperature), TEMPERATURES[0]), TEMPERATURES[1]),
            length=min(max(int(self.length), 1), MAX_LENGTH),
            tab=self.tab if self.tab in TABS else TABS[0],
        )

    def bits(self, batch: Batch) -> np.ndarray:
        """Returns the plans, (P, H) bool. Repeats the last one so that they cover the longest text of these choices."""
        plans = parse_bits(self.plan, batch.latent_dim)
        wanted = batch.num_plans(batch.max_length + self.length) if batch.plan_span != "sequence" else 1
        return np.concatenate([plans, plans[-1:].repeat(max(0, wanted - len(plans)), 0)])[:wanted]

    def link(self, origin: str, model: str) -> str:
        values = {"model": model, **{name: str(value) for name, value in vars(self).items()}}
        return f"{origin}/?{urlencode(values)}"

    @classmethod
    def from_query(cls, query: Mapping[str, str], start: "Choices") -> "Choices":
        """Reads choices from a link. Missing and unreadable values come from `start`."""
        found: dict[str, object] = {}
        for name, value in vars(start).items():
            if name in query:
                try:
                    found[name] = type(value)(query[name])
                except ValueError:
                    continue
        return replace(start, **found)  # type: ignore[arg-type]

    def curl(self, origin: str, model: str) -> str:
        """Returns a request to the page's server that generates the text shown on the page."""
        body = {
            "model": model,
            "prompt": self.prompt,
            "plan": self.plan,
            "prompt_plan": "prior",
            "seed": self.words,
            "temperature": self.temperature,
            "max_tokens": self.length,
        }
        content = shlex.quote(json.dumps(body, ensure_ascii=False))
        return f"curl {origin}/v1/completions -H 'Content-Type: application/json' -d {content}"

    def python(self, folder: str) -> str:
        """Returns Python code that generates under this plan without the server."""
        sampling = f"do_sample=True, temperature={self.temperature}, top_k=0" if self.temperature else "do_sample=False"
        return (
            "import torch\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "import free_transformer  # makes the Auto classes know the model\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
            f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
            f"prompt = tokenizer.bos_token + {self.prompt!r}\n"
            'tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids\n'
            f"torch.manual_seed({self.words})  # other random numbers than those of this page\n"
            f'text = model.generate(tokens, plan={self.plan!r}, prompt_plan="prior", '
            f"max_new_tokens={self.length}, {sampling})\n"
            "print(tokenizer.decode(text[0], skip_special_tokens=True))\n"
        )
