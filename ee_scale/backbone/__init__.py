"""A Hugging Face model as this rank's frozen shard: which layers, which slices, and what differs per architecture."""
