"""A new concept from photos: copying and checking them, proposing their class, and the entry in params.yaml."""
