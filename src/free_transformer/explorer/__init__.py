"""A page to play with plans: `free-transformer explore`."""
