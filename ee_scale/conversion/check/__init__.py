"""Whether a result computes what its source does: both are run, layer by layer."""
