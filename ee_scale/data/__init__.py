"""Text to Megatron `.bin/.idx`, GPT datasets over them and loaders that continue where a run stopped."""
