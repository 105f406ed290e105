"""The command line, `free-transformer`."""
