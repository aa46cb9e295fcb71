"""Section `tracking` of params.yaml: MLflow."""

from typing import Literal

from pydantic import Field

from customdiff.config.section import Section


class Tracking(Section):
    """MLflow. MLFLOW_TRACKING_URI, if set, takes precedence over the local store mlflow.db."""

    enabled: bool = Field(True, description="Log to MLflow.")
    experiment: str = Field("customdiff", min_length=1, description="Name of the MLflow experiment.")
    log_every: int = Field(10, ge=1, description="Steps between log writes.")
    score: Literal["harmonic_mean", "image_alignment", "text_alignment"] = Field(
        "harmonic_mean",
        description="What the champion among registered adapters is chosen by; the mean is that of both alignments.",
    )
