"""
Loads a model folder where `free_transformer` cannot be imported, and compares it with what the package computed.

    python load_alone.py FOLDER COMPUTED.pt OUT [NAME_ON_THE_HUB]

Run by tests/model/test_hub.py, and by tests/hub/check.py in an environment that has torch and `transformers` alone.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def main(folder: str, file: str, out: str, *names_on_the_hub: str) -> None:
    sys.modules["free_transformer"] = None  # type: ignore[assignment]  # to import it is an error from here on
    expected = torch.load(file)
    model = load(folder)
    compare(model, expected)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(Path(out) / "again")
    model.save_pretrained(Path(out) / "again")  # by the copies, which copy themselves along
    again = load(str(Path(out) / "again"))
    compare(again, expected)
    for name in names_on_the_hub:
        compare(load(name), expected)
    fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    fresh(expected["tokens"], labels=expected["tokens"]).loss.backward()
    assert all(parameter.grad is not None for parameter in fresh.parameters())
    run_card(folder)
    write = pipeline("text-generation", model=folder, trust_remote_code=True)
    assert write("It", max_new_tokens=3, do_sample=True)[0]["generated_text"].startswith("It")
    print(f"the same, by {type(model).__module__}")


def load(name: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert isinstance(model.config, type(model).config_class)
    return model


def compare(model: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, value in computed(model, expected["tokens"]).items():
        assert torch.equal(value, expected[name]), f"{name} differs by {(value - expected[name]).abs().max()}"


@torch.no_grad()
def computed(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Results that must be bit-for-bit equal: plans read, logits under them, text."""
    mask, plan_logits = torch.ones_like(tokens), model.infer_plan(tokens)
    plan = plan_logits > 0
    values = {"tokens": tokens, "plan_logits": plan_logits, "logits": model(tokens, plan=plan).logits}
    for name, options in {"under a plan": {"plan": plan}, "sampled": {"do_sample": True}}.items():
        torch.manual_seed(0)
        values[name] = model.generate(tokens, attention_mask=mask, max_new_tokens=8, **options)
    return values


def run_card(folder: str) -> None:
    """Runs the example of the model card."""
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (Path(folder) / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(block.replace('name = "."', f"name = {folder!r}"), scope)
    assert scope["generated"].shape[1] > scope["prompt"].shape[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
