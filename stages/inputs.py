"""inputs: check params.yaml and its prompts, and write the inputs of every stage to data/inputs for DVC.

The outputs of concepts that params.yaml no longer names are moved to data/former.
"""

from customdiff.errors import one_line_errors


def main() -> None:
    """Check params.yaml, the evaluation prompts and holdout photos, before training."""
    from customdiff import config, stage_inputs
    from customdiff.evaluation.prompts import check_grading_prompts, read_all_prompts
    from customdiff.sources.holdout import check_source

    params = config.load()
    prompts = read_all_prompts(params.evaluate.prompts, params.concepts)
    if params.train.grades_checkpoints:
        check_grading_prompts(params.train.grading.prompts, prompts)
    for name, concept in params.concepts.items():
        check_source(name, concept, params.download)
    stage_inputs.write_inputs(params)
    stage_inputs.set_former_concepts_aside(params.concepts)


if __name__ == "__main__":
    with one_line_errors():
        main()
