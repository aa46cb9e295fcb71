"""What a base model is made of: text, attention, modifier tokens, methods, CLIP and sampling."""
