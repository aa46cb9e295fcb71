"""evaluate: text and image alignment of the adapter beside those of the base model, as figures, images and a report."""

import json
import time
from functools import partial
from pathlib import Path

from customdiff import config
from customdiff.errors import one_line_errors
from customdiff.files import atomic_directory

ADAPTER, TRAINING, RESULTS = Path("models/adapter"), Path("results/train"), Path("results/evaluate")


def main() -> None:
    params = config.load()
    settings = params.evaluate

    # seconds that a mistake in params.yaml need not wait for
    from customdiff import tracking
    from customdiff.adapters import adapter
    from customdiff.evaluation import report, scores
    from customdiff.evaluation.base_image_cache import drawn_folder
    from customdiff.models import base, sampling
    from customdiff.models.clip import Clip

    adapter_config = adapter.read_config(ADAPTER)
    scores.check_concepts(adapter_config, params)
    prompts = scores.all_prompts(params)
    instances = {name: scores.read_instances(Path("data/instances", name)) for name in params.concepts}
    device = base.device(params.base.device)
    pipe = base.load_pipeline(params.base, dtype=base.DTYPES[settings.precision], device=device)
    sampling.set_scheduler(pipe, settings.scheduler)
    judge = Clip.load(settings.clip, device)

    started = time.perf_counter()
    pairs = scores.draw(pipe, partial(adapter.load, folder=ADAPTER), params, prompts, drawn_folder())
    rows = scores.score(pairs, instances, judge)
    metrics = scores.summarize(rows, resamples=settings.bootstrap, seed=params.base.seed)
    metrics |= {
        "seconds": round(time.perf_counter() - started, 1),
        "num_prompts": len(rows),
        "num_images": len(pairs),
    }
    sheet = report.contact_sheet(pairs, instances, params)
    page = report.html(metrics, rows, sheet, params, adapter_config, TRAINING / "steps.csv")
    with atomic_directory(RESULTS) as out:
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (out / "report.html").write_text(page, encoding="utf-8")
        scores.write_table(rows, out / "per_prompt.csv")
        scores.write_images(pairs, out / "images")
        sheet.save(out / "contact_sheet.jpg", quality=90)
    print("\n".join([*report.verdicts(metrics), f"{RESULTS / 'report.html'} shows them"]))

    with tracking.for_evaluation(params, TRAINING / "run.json") as tracker:
        tracker.evaluation(params, metrics, RESULTS, ADAPTER)


if __name__ == "__main__":
    with one_line_errors():
        main()
