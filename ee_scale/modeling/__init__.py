"""What goes into an exported folder, every file: they import torch, transformers, Python and one another only."""
