"""inputs: check params.yaml, and write the inputs of every stage to data/inputs for DVC."""

from customdiff.errors import one_line_errors


def main() -> None:
    """Check params.yaml and write data/inputs."""
    from customdiff import config, stage_inputs

    stage_inputs.write_inputs(config.load())


if __name__ == "__main__":
    with one_line_errors():
        main()
