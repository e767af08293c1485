"""What is copied into an exported folder, every file of it: imports of torch, transformers, Python and one another."""
