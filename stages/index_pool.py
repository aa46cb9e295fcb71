"""index-pool: embed the pool of class images with clip-retrieval, in data/index."""

from customdiff.errors import one_line_errors

FOLDER = "data/index"


def main() -> None:
    """Build the index if class images come from the pool."""
    from customdiff import config
    from customdiff.retrieval import clip_index

    params = config.load()
    retrieve = params.retrieve
    if not params.train.preserves_prior:
        clip_index.no_index(FOLDER, "no class images are used (train.with_prior_preservation, train.method)")
        print("no class images are used: no index is needed")
        return
    if retrieve.backend != "index":
        clip_index.no_index(FOLDER, f"retrieve.backend is {retrieve.backend}")
        print(f"retrieve.backend is {retrieve.backend}: no index is needed")
        return
    limit = params.download.max_megapixels
    result = clip_index.build_index(retrieve.index.pool, retrieve.index.clip, FOLDER, max_megapixels=limit)
    print(f"{result.count} images of {retrieve.index.pool} indexed in {FOLDER}, {len(result.set_aside)} set aside")
    for refused in result.set_aside:
        print(f"  set aside: {refused.name}: {refused.reason}")
    print("  seconds: " + ", ".join(f"{step} {seconds}" for step, seconds in result.seconds.items()))


if __name__ == "__main__":
    with one_line_errors():
        main()
