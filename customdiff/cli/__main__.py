"""`python -m customdiff.cli`."""

from customdiff.cli import app

app()
