"""evaluate: the figures of the adapter beside those of the base model, with images and a report."""

import time
from pathlib import Path

from customdiff import config
from customdiff.errors import one_line_errors
from customdiff.files import atomic_directory

ADAPTER, TRAINING, RESULTS = Path("models/adapter"), Path("results/train"), Path("results/evaluate")


def main() -> None:
    """Evaluate the adapter of the last training."""
    params = config.load()  # before slow imports, so that errors in params.yaml appear at once

    from customdiff import provenance, tracking
    from customdiff.adapters.config import read_config
    from customdiff.evaluation import drift, report, scores, verdict
    from customdiff.evaluation.base_image_cache import cache_folder
    from customdiff.evaluation.generation import Generation, customized_subject, generate_pairs, write_images
    from customdiff.evaluation.grading import Photos, grade
    from customdiff.evaluation.judges import Judges
    from customdiff.evaluation.prompts import read_all_prompts
    from customdiff.images import save_sheet
    from customdiff.publishing import registry
    from customdiff.sources.instance_images import captioned_photos

    settings, concepts = params.evaluate, params.concepts
    adapter_config = read_config(ADAPTER)
    scores.check_concepts(adapter_config, concepts)
    prompts = read_all_prompts(settings.prompts, concepts)
    controls = drift.control_prompts(settings, concepts, prompts)
    photos, judges = Photos.read(params), Judges.load(params)

    started = time.perf_counter()
    generation = Generation(params.base, settings, concepts, cache_folder())
    ((_, pairs),) = generate_pairs(generation, {"customized": ADAPTER}, prompts, controls)
    scored, summary = grade(pairs, photos, judges, params)
    captioned = {name: captioned_photos(Path("data/instances", name)) for name in concepts}
    found = verdict.verdicts(summary, params, captioned)
    seconds = time.perf_counter() - started
    sheet = report.contact_sheet([pair for pair in pairs if not pair.is_control], photos.instances, concepts)
    sheets = [Path("data/prepared", name, "sheet.jpg") for name in concepts]
    steps, strip = TRAINING / "steps.csv", drift.strip(pairs)
    page = report.html(
        summary, scored, sheet, params, adapter_config, steps, photos=sheets, verdicts=found, controls=strip
    )
    with atomic_directory(RESULTS) as out:
        (out / "metrics.json").write_text(summary.to_json(), encoding="utf-8")
        (out / "summary.json").write_text(summary.to_short_json(), encoding="utf-8")
        (out / "report.html").write_text(page, encoding="utf-8")
        scores.write_table(scored, out / "per_prompt.csv")
        write_images(pairs, out / "images")
        save_sheet(sheet, out / "contact_sheet.jpg")
    print("\n".join([*report.changes(summary), *verdict.lines(found), f"report: {RESULTS / 'report.html'}"]))

    texts = [generation.text(prompt, customized_subject) for prompt in prompts]
    name, tags = tracking.run_name(params), provenance.run_tags()
    with tracking.for_evaluation(params.tracking, TRAINING / "run.json", ADAPTER, name, tags=tags) as tracker:
        judged = registry.Judged(verdict.lines(found), *verdict.tracked(summary, found), seconds)
        registered = registry.log_evaluation(tracker, params, RESULTS, ADAPTER, texts, judged)
    if registered:
        print(f"MLflow: {registered}")


if __name__ == "__main__":
    with one_line_errors():
        main()
