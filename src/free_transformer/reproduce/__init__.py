"""Experiments of the paper, as commands."""
