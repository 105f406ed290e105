"""Integrations with other libraries: the trainers of transformers and TRL, and lm-evaluation-harness."""
