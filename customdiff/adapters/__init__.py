"""Adapters: what a training learned, merging, compression, and the formats of other programs."""
