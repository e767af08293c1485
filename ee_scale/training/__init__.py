"""The training loop and its recipes. Knows engines and data, not file formats."""
