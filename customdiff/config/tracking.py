"""Section `tracking` of params.yaml: MLflow."""

from pydantic import Field

from customdiff.config.section import Section


class Tracking(Section):
    """MLflow. MLFLOW_TRACKING_URI, if set, takes precedence over the local store mlflow.db."""

    enabled: bool = Field(True, description="Log to MLflow.")
    experiment: str = Field("customdiff", min_length=1, description="Name of the MLflow experiment.")
    log_every: int = Field(10, ge=1, description="Steps between log writes.")
