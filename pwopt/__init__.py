"""pwopt: makes trained ONNX convolutional networks cheaper with 1×1 convolutions.

The public names are imported when first used, so that ``pwopt --help`` need not wait for
onnxruntime.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pwopt.analysis import Analysis as Analysis
    from pwopt.analysis import analyze as analyze
    from pwopt.checking import Verdict as Verdict
    from pwopt.checking import check as check
    from pwopt.errors import PwoptError as PwoptError
    from pwopt.model import Model as Model
    from pwopt.registry import pipeline as pipeline
    from pwopt.rewriting import Context as Context
    from pwopt.rewriting import Event as Event
    from pwopt.rewriting import Observer as Observer
    from pwopt.rewriting import Pass as Pass
    from pwopt.rewriting import PassReport as PassReport
    from pwopt.rewriting import Pipeline as Pipeline
    from pwopt.search.search import Bounds as Bounds
    from pwopt.workflow import Rewritten as Rewritten
    from pwopt.workflow import rewrite as rewrite

_HOMES = {
    "Analysis": "analysis",
    "Bounds": "search.search",
    "Context": "rewriting",
    "Event": "rewriting",
    "Model": "model",
    "Observer": "rewriting",
    "Pass": "rewriting",
    "PassReport": "rewriting",
    "Pipeline": "rewriting",
    "PwoptError": "errors",
    "Rewritten": "workflow",
    "Verdict": "checking",
    "analyze": "analysis",
    "check": "checking",
    "pipeline": "registry",
    "rewrite": "workflow",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pwopt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pwopt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
