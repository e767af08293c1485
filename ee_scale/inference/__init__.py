"""Models with exits, opened for use. Knows nothing of training."""
