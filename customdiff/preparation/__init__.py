"""Stage prepare: captions, augmentation and prepared sets."""
