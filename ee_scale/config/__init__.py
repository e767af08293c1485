"""Hydra configuration: dataclasses, composition and pure cross-field checks. No torch, no model files."""
