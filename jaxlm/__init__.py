"""jaxlm: BERT and GPT models on any mesh, from raw text to a model that others load.

From Python: `load`, `train`, `plan`, `load_settings` (`jaxlm.api`, docs/python.md). Nothing is imported before it is
asked for: `jaxlm --help` needs no JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.api import LoadedModel, load, load_settings, plan, train

__all__ = ["LoadedModel", "load", "load_settings", "plan", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from jaxlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'jaxlm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
