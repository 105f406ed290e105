"""`import free_transformer` imports neither torch nor `transformers`, and still the Auto classes know our classes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import free_transformer
from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.model.hub_code import code_files

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


BEFORE = [
    "import free_transformer",
    "import transformers\nimport free_transformer",
    "import free_transformer.deploy",
    "from free_transformer.model.configuration import FreeTransformerConfig",
    "from free_transformer.model.plan import bits_to_codes",
    "import free_transformer\nfrom trl import SFTTrainer",
]


@pytest.fixture(scope="module")
def loaded(folder):
    """What each way of importing prints, each in a process of its own that only torch has been imported in."""
    configuration = "from transformers import AutoConfig\nprint(AutoConfig.from_pretrained({folder!r}))"
    codes = [f"{before}\n{LOAD.format(folder=folder)}" for before in BEFORE]
    codes.append(f"import free_transformer\n{configuration.format(folder=folder)}")
    output = run_python(
        f"import os, sys, torch\nassert 'transformers' not in sys.modules\nfor code in {codes!r}:\n"
        "    if not (child := os.fork()):\n        exec(code, {})\n        sys.stdout.flush()\n        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, code\n    print('-----', flush=True)\n"
    )
    return output.split("-----\n")


@pytest.mark.parametrize("before", BEFORE)
def test_the_auto_classes_know_a_free_transformer(before, loaded):
    assert "FreeTransformer'" in loaded[BEFORE.index(before)]


def test_the_auto_configuration_knows_it(loaded):
    assert "FreeTransformerConfig" in loaded[len(BEFORE)]


def test_unknown_names_are_told():
    import free_transformer

    assert set(free_transformer.__all__) <= set(dir(free_transformer))
    assert all(hasattr(free_transformer, name) for name in free_transformer.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'FreeTransformr'"):
        _ = free_transformer.FreeTransformr


# Each room imports only from itself and from rooms above it in this list.
ORDER = (
    "quiet",
    "model",
    "errors",
    "files",
    "runtime",
    "data",
    "settings",
    "distributed",
    "evaluation",
    "reporting",
    "runs",
    "training",
    "export",
    "integrations",
    "reproduce",
    "serving",
    "explorer",
    "cli",
)
PUBLIC_NAMES = {"auto_classes", "deploy", "losses", "plan", "synthetic_data", "trainer", "__init__", "__main__"}
PACKAGE = Path(free_transformer.__file__).parent


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported_by(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"^\s*(?:from|import) free_transformer\.(\w+)", text, re.M)) | set(
        re.findall(r"^\s*from free_transformer import (\w+)", text, re.M)
    ) & {*ORDER}


def test_rooms_import_one_way():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room in PUBLIC_NAMES:
            continue
        above = {*ORDER[: ORDER.index(room) + 1]}
        assert rooms_imported_by(path) <= above, path


def test_no_module_is_in_an_import_circle():
    """Within a room too. Imports for type checking count."""
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    imports = {
        name: {each for each in imported_modules(name, path) if each in modules} for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for each in imports[name]:
                visit(each, (*above, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def imported_modules(name: str, path: Path) -> set[str]:
    """At the top of a file; `from .x import y` as in `model/`."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module}" if node.level else (node.module or "").removeprefix("free_transformer.")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found - {package}


def test_the_model_is_closed():
    """Its files import only each other, and a saved model carries them; `modeling` reaches each of them."""
    folder = PACKAGE / "model"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    reached, todo = set(), ["modeling"]
    while todo:
        name = todo.pop()
        reached.add(name)
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) free_transformer", text, re.M), name
        todo += [each for each in re.findall(r"^\s*from \.(\w+) import", text, re.M) if each not in reached]
    assert reached == names
    assert {path.stem for path in code_files()} == names


def test_internals_of_transformers_are_imported_in_one_place():
    """All else comes from the top level of `transformers`, which has a deprecation policy."""
    package = Path(free_transformer.__file__).parent
    for path in package.rglob("*.py"):
        used = set(re.findall(r"^\s*(?:from|import) (transformers\.[\w.]+)", path.read_text(encoding="utf-8"), re.M))
        public = {"transformers.utils"}  # documented for its `logging`
        if path.name == "trainer.py":  # it needs `accelerate`, which the model does not
            public.add("transformers.trainer_utils")
        assert path.name == "compat.py" or used <= public, path
