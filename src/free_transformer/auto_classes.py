"""
Registers our classes with the Auto classes of `transformers`, without importing `transformers` before it is needed.

`import free_transformer` takes milliseconds, and an exported model runs without torch and `transformers`, which need
not even be installed (`free_transformer.deploy`). Registration follows directly after the first import of
`transformers`, or of the first of our modules that depends on it. Registering later could interfere with circular
imports.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules of `model/`, which registration imports; other packages do not need it.
WITHOUT_TORCH = {
    f"free_transformer.model.{name}" for name in ("context", "errors", "plan_text", "sampling", "stratified")
}


def register_soon() -> None:
    """Registers now if `transformers` has been imported, else as soon as it is."""
    if importlib.util.find_spec("torch") is None:
        return
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Registrar())


def _register() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from free_transformer.model.configuration import FreeTransformerConfig
    from free_transformer.model.modeling import FreeTransformer

    AutoConfig.register(FreeTransformerConfig.model_type, FreeTransformerConfig, exist_ok=True)
    AutoModelForCausalLM.register(FreeTransformerConfig, FreeTransformer, exist_ok=True)


class _Registrar:
    """An import finder that finds no modules itself, but runs `_register` after the import that it waits for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        of_model = name.startswith("free_transformer.model.") and name not in WITHOUT_TORCH
        if name != "transformers" and not of_model:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # finding a module does not imply importing it
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                registers = self in sys.meta_path
                if registers:
                    sys.meta_path.remove(self)
                execute(module)
                if registers:
                    _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
