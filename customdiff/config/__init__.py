"""Schema and defaults of params.yaml, one module per section: every key with its default, unit and range.

Defaults are the values of diffusers' guide to Custom Diffusion. A few differ from the defaults of its script; see
docs/migrating-from-diffusers.md.
"""

from customdiff.config.base import Base
from customdiff.config.concepts import Concept, Source, unknown_tokens
from customdiff.config.download import Download
from customdiff.config.evaluate import Evaluate
from customdiff.config.params import Params, concept, load, parse, stage_concept, with_evaluation
from customdiff.config.prepare import Prepare
from customdiff.config.retrieve import Generate, Index, Retrieve, Service
from customdiff.config.section import ParamsError
from customdiff.config.tracking import Tracking
from customdiff.config.train import Launch, Train, Validation

__all__ = [
    "Base",
    "Concept",
    "Download",
    "Evaluate",
    "Generate",
    "Index",
    "Launch",
    "Params",
    "ParamsError",
    "Prepare",
    "Retrieve",
    "Service",
    "Source",
    "Tracking",
    "Train",
    "Validation",
    "concept",
    "load",
    "parse",
    "stage_concept",
    "unknown_tokens",
    "with_evaluation",
]
