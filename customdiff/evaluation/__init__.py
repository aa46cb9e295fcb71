"""Stage evaluate, comparisons and sweeps: prompts, generation, metrics and reports."""
