"""StableHLO bundles: made, checked, and verified by compilers that are not ours."""
