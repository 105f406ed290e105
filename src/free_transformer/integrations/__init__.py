"""The model inside other libraries: the Trainers of transformers and TRL, and lm-evaluation-harness."""
