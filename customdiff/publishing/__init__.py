"""The Hugging Face Hub: adapters with a model card."""
