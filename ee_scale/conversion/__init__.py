"""Checkpoints of other worlds: Megatron-Core, Megatron's legacy files, EE-LLM, DeepSpeed; plain tensors only."""
