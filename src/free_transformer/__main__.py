"""`python -m free_transformer`, the same as `free-transformer`."""

from free_transformer.cli.main import main

main()
