"""inputs: check params.yaml and its prompts, and write the inputs of every stage to data/inputs for DVC."""

from customdiff.errors import one_line_errors


def main() -> None:
    """Check params.yaml and the evaluation prompts, so that no mistake in them appears only after training."""
    from customdiff import config, stage_inputs
    from customdiff.evaluation.prompts import read_all_prompts

    params = config.load()
    read_all_prompts(params.evaluate.prompts, params.concepts)
    stage_inputs.write_inputs(params)


if __name__ == "__main__":
    with one_line_errors():
        main()
