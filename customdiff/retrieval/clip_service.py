"""Client of a clip-retrieval HTTP service (`clip-retrieval back`): query it and download the images that it names.

The request is the one that clip-retrieval's ClipClient sends; importing that class would add torch, faiss and old
pinned versions as requirements. The addresses in the response are untrusted: each is downloaded by `http.fetch`.
"""

import base64
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from customdiff.config import Service
from customdiff.errors import UserError, printable
from customdiff.redaction import redact
from customdiff.sources import http, image_folder
from customdiff.sources.image_folder import SourceImage

FACTOR = 1.5  # ratio of images requested to images wanted, as in the reference
MAX_RESULTS = 10_000  # above this the reference does not request more
MAX_IMAGE_BYTES = 32_000_000
MAX_ANSWER_BYTES = 512_000_000
MAX_LIST_BYTES = 1_000_000
DEADLINES = 2  # a request may take this many times `service.timeout`


def service_images(
    service: Service,
    class_prompt: str,
    count: int,
    *,
    embedding: list[float] | None = None,
    keep: Callable[[str, float | None], bool] | None = None,
    transport: httpx.BaseTransport | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[SourceImage, float | None]]:
    """Images that a service finds for a class prompt, undecoded, in its order, each with its similarity.

    As in the reference, the first query requests 1.5 times `count` images, and each further one 1.5 times more than the
    one before; stop iterating when there are enough. `service.parallel` images are downloaded at a time, and at most
    twice as many ahead of their use. Images whose server sends `X-Robots-Tag: noai` are not used.

    Args:
        embedding: of the class prompt by the CLIP of the index; None: the service embeds the text.
        keep: whether an image is downloaded, from its caption and its similarity; None: every image is.
        transport, pause: replace the network and the waiting in tests.

    Raises:
        UserError: the service cannot be reached, or its response is not that of a clip-retrieval service.
    """
    asked = int(FACTOR * count)
    tried: set[str] = set()
    with http.client(service.timeout, transport) as client, ThreadPoolExecutor(service.parallel) as threads:
        while True:
            fresh = []
            for answer in ask_service(client, service, class_prompt, asked, pause, embedding):
                label = printable(str(answer.get("url") or answer.get("image_path") or answer.get("id")))
                if label not in tried:
                    tried.add(label)
                    fresh.append((label, answer))
            wanted = [each for each in fresh if keep is None or keep(_caption(each[1]), _number(each[1]))]
            for start in range(0, len(wanted), 2 * service.parallel):
                batch = wanted[start : start + 2 * service.parallel]
                items = threads.map(lambda named: _download(client, service, *named), batch)
                for item, (_, answer) in zip(items, batch, strict=True):
                    yield item, _number(answer)
            if not fresh or asked > MAX_RESULTS:
                return
            asked = int(FACTOR * asked)


def ask_service(
    client: httpx.Client,
    service: Service,
    class_prompt: str,
    count: int,
    pause: Callable[[float], None] = time.sleep,
    embedding: list[float] | None = None,
) -> list[dict[str, Any]]:
    """POST one query to a knn-service, with the fields that clip-retrieval's ClipClient sends.

    Returns:
        Entries with `id`, `similarity`, and if the index has them `url`, `caption`, `image` (base64) and `image_path`.

    Raises:
        UserError: the query failed, also after `service.retries` retries, or the response is not a knn-service's.
    """
    query = {
        "text": None if embedding else class_prompt,
        "image": None,
        "image_url": None,
        "embedding_input": embedding,
        "deduplicate": True,
        "use_safety_model": True,
        "use_violence_detector": True,
        "indice_name": service.index_name,
        "use_mclip": False,
        "aesthetic_score": 9,
        "aesthetic_weight": 0.1,  # as in the reference
        "modality": "image",
        "num_images": count,
        "num_result_ids": count,
    }
    for attempt in range(service.retries + 1):
        if attempt:
            pause(min(2.0 ** (attempt - 1), 30))
        body = io.BytesIO()
        try:
            http.post_json(
                client, service.url, query, body, max_bytes=MAX_ANSWER_BYTES, deadline=DEADLINES * service.timeout
            )
            break
        except http.FetchError as error:
            if attempt == service.retries or not error.retry:
                raise UserError(_problem(client, service, error)) from error
    try:
        answers = json.loads(body.getvalue(), parse_int=_integer)
    except (ValueError, RecursionError):
        answers = None
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(
            f"retrieve.service.url: {redact(service.url)} did not answer with a list of images; "
            "give the address of a knn-service"
        )
    return answers


def _problem(client: httpx.Client, service: Service, error: http.FetchError) -> str:
    """What to tell the user about a failed query."""
    names = _index_names(client, service) if error.status == 500 else []  # its answer to an unknown index
    if names and service.index_name not in names:
        return f"retrieve.service.index_name: the service has no {service.index_name}; it has {', '.join(names)}"
    message = f"retrieve.service.url: {redact(service.url)}: {error}"
    if http.origin_of(service.url)[0].endswith("laion.ai"):
        message += "; LAION's public service has been off since 2024"
    return f"{message}; use retrieve.backend: index or generate, or serve your own index with `clip-retrieval back`"


def _index_names(client: httpx.Client, service: Service) -> list[str]:
    """Names of a service's indices, from its indices-list; empty if that fails."""
    body = io.BytesIO()
    try:
        http.fetch(
            client,
            str(httpx.URL(service.url).join("indices-list")),
            body,
            max_bytes=MAX_LIST_BYTES,
            schemes=("http", "https"),
            trusted=frozenset({http.origin_of(service.url)}),
            deadline=DEADLINES * service.timeout,
        )
        names = json.loads(body.getvalue())
    except (http.FetchError, httpx.InvalidURL, ValueError, RecursionError):
        return []
    return [printable(str(name)[:100]) for name in names][:20] if isinstance(names, list) else []


def _download(client: httpx.Client, service: Service, label: str, answer: dict[str, Any]) -> SourceImage:
    """The image of one entry of a service's response; runs in a thread."""
    caption = _caption(answer)
    if encoded := answer.get("image"):
        try:
            return SourceImage(label, base64.b64decode(encoded, validate=True), caption)
        except (ValueError, TypeError):
            return SourceImage(label, b"", caption, "invalid base64")
    if not answer.get("url"):
        return SourceImage(label, b"", caption, "has neither an address nor an image")
    body = io.BytesIO()
    try:
        headers = http.fetch(
            client,
            str(answer["url"]),
            body,
            max_bytes=MAX_IMAGE_BYTES,
            schemes=("http", "https"),
            trusted=frozenset({http.origin_of(service.url)}),
            deadline=DEADLINES * service.timeout,
        )
    except http.FetchError as error:
        return SourceImage(label, b"", caption, str(error))
    robots = headers.get("x-robots-tag", "").lower()
    if "noai" in robots or "noimageai" in robots:
        return SourceImage(label, b"", caption, "its server forbids use for training (X-Robots-Tag)")
    return SourceImage(label, body.getvalue(), caption)


def _caption(answer: dict[str, Any]) -> str:
    return image_folder.one_line(str(answer.get("caption") or "")) or ""


def _number(answer: dict[str, Any]) -> float | None:
    similarity = answer.get("similarity")
    return float(similarity) if isinstance(similarity, int | float) and math.isfinite(similarity) else None


def _integer(digits: str) -> float:
    """An integer of JSON; of more than 64 bits the nearest float, because `int` refuses thousands of digits."""
    return int(digits) if len(digits) < 19 else float(digits)
