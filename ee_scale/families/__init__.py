"""One object per family of models: all that differs between them. Everything else asks it."""
