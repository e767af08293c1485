"""Shared parts of the tests: processes, tiny models, the plain-autograd reference."""
