"""Adapters: reading and writing, injection, merging, compression, and the formats of other programs."""
