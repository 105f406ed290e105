"""The folder of a run: its files, how they are read and written, and how results are shown."""
