"""Custom Diffusion (Kumari et al., CVPR 2023) as a reproducible pipeline."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import, and most of the package does without them
    if name == "load":
        from customdiff.publishing.hub import load

        return load
    raise AttributeError(f"module 'customdiff' has no attribute {name!r}")
