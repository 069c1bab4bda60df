"""Checkpoints of Hugging Face `transformers`: folders in and out, family by family, as tables that serve both ways."""
