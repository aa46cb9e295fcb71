"""No secret of an address is shown or logged."""

import pytest

from customdiff.redaction import redact

SECRET = "S3cr"


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://bob:S3cr@tPW@host.org/a.zip", "host.org/a.zip"),
        ("https://S3cret@host.org:8080/a.zip", "host.org:8080/a.zip"),
        ("https://bob:S3cr/et@host.org/a.zip", "host.org/a.zip"),
        ("https://host.org/a.zip?token=S3cret&v=1", "host.org/a.zip"),
        ("https://host.org/a.zip?v=1&password=S3cret#S3cret", "host.org/a.zip"),
        ("postgresql+psycopg2://bob:S3cr@t@db:5432/mlflow", "db:5432/mlflow"),
        ("https://host.org?password=S3cret", "host.org"),
        ("databricks://S3cret-profile", "databricks://"),
    ],
)
def test_secrets_are_masked_and_the_rest_is_kept(address, kept):
    for text in (address, f"url: '{address}' failed", f'{{"url": "{address}"}}'):
        masked = redact(text)
        assert SECRET not in masked
        assert kept in masked
        assert redact(masked) == masked


@pytest.mark.parametrize(
    "text",
    ["", "no address? none # here", "https://host.org/a.zip", "a@b.org: https://host.org/", "sqlite:///a/b.db"],
)
def test_text_without_secrets_is_unchanged(text):
    assert redact(text) == text
