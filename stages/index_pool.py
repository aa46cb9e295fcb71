"""index-pool: embed and index the pool of class images with clip-retrieval, once a pool, in data/index/."""

from customdiff import config
from customdiff.errors import one_line_errors
from customdiff.retrieval import clip_index

FOLDER = "data/index"

with one_line_errors():
    settings = config.load()
    retrieve = settings.retrieve
    if retrieve.backend != "index":
        clip_index.no_index(FOLDER, retrieve.backend)
        print(f"retrieve.backend is {retrieve.backend}: no index is needed")
    else:
        result = clip_index.build_index(
            retrieve.index.pool, retrieve.index.clip, FOLDER, max_megapixels=settings.download.max_megapixels
        )
        print(f"{result.count} images of {retrieve.index.pool} indexed in {FOLDER}, {len(result.set_aside)} set aside")
        for refused in result.set_aside:
            print(f"  set aside: {refused.name}: {refused.reason}")
        print("  seconds: " + ", ".join(f"{step} {seconds}" for step, seconds in result.seconds.items()))
