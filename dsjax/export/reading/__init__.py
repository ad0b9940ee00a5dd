"""A bundle read back, with nothing in it trusted."""
