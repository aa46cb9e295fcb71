"""Custom Diffusion (Kumari et al., CVPR 2023) as a reproducible pipeline."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customdiff.publishing.hub import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import, and most of the package works without them
    if name == "load":
        return importlib.import_module("customdiff.publishing.hub").load
    raise AttributeError(f"module 'customdiff' has no attribute {name!r}")
