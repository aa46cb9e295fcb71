"""`customdiff app`: a local page over the pipeline, one module per tab; `pipeline` and `player` need no browser."""
