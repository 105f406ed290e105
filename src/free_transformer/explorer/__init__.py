"""A web page to explore plans: `free-transformer explore`."""
