"""index-pool: embed and index the pool of class images with clip-retrieval, once a pool, in data/index/."""

from customdiff import params, pool
from customdiff.errors import one_line_errors

FOLDER = "data/index"

with one_line_errors():
    settings = params.load()
    retrieve = settings.retrieve
    if retrieve.backend != "index":
        pool.no_index(FOLDER, retrieve.backend)
        print(f"retrieve.backend is {retrieve.backend}: no index is needed")
    else:
        result = pool.build_index(
            retrieve.index.pool, retrieve.index.clip, FOLDER, max_megapixels=settings.download.max_megapixels
        )
        print(f"{result.count} images of {retrieve.index.pool} indexed in {FOLDER}, {len(result.set_aside)} set aside")
        for refused in result.set_aside:
            print(f"  set aside: {refused.name}: {refused.reason}")
        print("  seconds: " + ", ".join(f"{step} {seconds}" for step, seconds in result.seconds.items()))
