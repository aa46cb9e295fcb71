"""Base models: loading, text encoding, attention, modifier tokens, training methods, CLIP and sampling."""
