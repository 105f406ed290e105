"""`import free_transformer` imports neither torch nor `transformers`, and still the Auto classes know our classes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import free_transformer
from free_transformer import FreeTransformer, FreeTransformerConfig

LOAD = "from transformers import AutoModelForCausalLM\nprint(type(AutoModelForCausalLM.from_pretrained({folder!r})))"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    FreeTransformer(FreeTransformerConfig(hidden_dim=32, num_layers=2, latent_dim=4)).save_pretrained(path)
    return str(path)


def test_the_package_imports_no_torch():
    code = "import sys, free_transformer, free_transformer.deploy, free_transformer.files\n"
    assert run_python(code + "print([m for m in ('torch', 'transformers') if m in sys.modules])") == "[]\n"


def test_the_package_imports_where_torch_is_not_installed():
    code = "import sys\nsys.modules['torch'] = None\nimport transformers, free_transformer, free_transformer.deploy\n"
    run_python(code + "import free_transformer.serving.app, free_transformer.serving.onnx_batch")


@pytest.mark.parametrize(
    "before",
    [
        "import free_transformer",
        "import transformers\nimport free_transformer",
        "import free_transformer.deploy",
        "from free_transformer.model.configuration import FreeTransformerConfig",
        "from free_transformer.model.plan import bits_to_codes",
        "import free_transformer\nfrom trl import SFTTrainer",
    ],
)
def test_the_auto_classes_know_a_free_transformer(before, folder):
    assert "FreeTransformer'" in run_python(before + "\n" + LOAD.format(folder=folder))


def test_the_auto_configuration_knows_it(folder):
    code = (
        f"import free_transformer\nfrom transformers import AutoConfig\nprint(AutoConfig.from_pretrained({folder!r}))"
    )
    assert "FreeTransformerConfig" in run_python(code)


def test_unknown_names_are_told():
    import free_transformer

    assert set(free_transformer.__all__) <= set(dir(free_transformer))
    assert all(hasattr(free_transformer, name) for name in free_transformer.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'FreeTransformr'"):
        _ = free_transformer.FreeTransformr


CORE = (
    "attention",
    "cache",
    "compat",
    "config",
    "encoder",
    "generation",
    "initialization",
    "injection",
    "layers",
    "layout",
)
CORE += ("losses", "model", "numerics", "plan", "plan_text", "pretrained", "sampling", "straight_through")


def imported_by(path: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, `training` for free_transformer.training.loop."""
    names = re.findall(r"^\s*(?:from|import) (?:free_transformer)?\.(\w+)", path.read_text(encoding="utf-8"), re.M)
    return set(names)


def test_imports_run_one_way():
    package = Path(free_transformer.__file__).parent
    for name in CORE:
        assert imported_by(package / f"{name}.py") <= {*CORE, "sharing", "errors"}, name
    for path in package.rglob("*.py"):
        assert "cli" not in imported_by(path) or path.name == "__main__.py", path
    for path in (package / "evaluation").glob("*.py"):
        assert not imported_by(path) & {"cli", "serving", "deploy"}, path


def test_internals_of_transformers_are_imported_in_one_place():
    """All else comes from the top level of `transformers`, which has a deprecation policy."""
    package = Path(free_transformer.__file__).parent
    for path in package.rglob("*.py"):
        used = set(re.findall(r"^\s*(?:from|import) (transformers\.[\w.]+)", path.read_text(encoding="utf-8"), re.M))
        public = {"transformers.utils"}  # documented for its `logging`
        if path.name == "trainer.py":  # it needs `accelerate`, which the model does not
            public.add("transformers.trainer_utils")
        assert path.name == "compat.py" or used <= public, path
