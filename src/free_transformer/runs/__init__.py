"""The folder of a run: what it holds, who writes it, and how it is shown."""
