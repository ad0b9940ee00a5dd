"""StableHLO modules: written as files, read back, and what is in them."""
