"""Exit heads: what an exit is, where it sits, how it is initialised and what it is trained on."""
