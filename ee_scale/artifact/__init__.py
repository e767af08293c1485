"""What lies on disk: checkpoints of a run, the sidecar, and exported Hugging Face folders. Nothing is pickled."""
