"""Tell transformers about models whose layers differ in width, as soon as it is imported and not before.

With `import secateur` anywhere in the process, before or after `import transformers`, `AutoConfig` and
`AutoModelForCausalLM` load such checkpoints with the class of this package, without `trust_remote_code=True`. Importing
transformers for that would make `import secateur` slow, so the registration waits for the module that keeps the list of
model types.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

LIST_OF_TYPES = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Register now if transformers' list of model types is loaded, otherwise when it is."""
    if LIST_OF_TYPES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from secateur.modeling_per_layer import MODEL_TYPE, PerLayerConfig

    AutoConfig.register(MODEL_TYPE, PerLayerConfig, exist_ok=True)


class _Waiting(MetaPathFinder):
    """Finds the one module as everybody would, and registers when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LIST_OF_TYPES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
