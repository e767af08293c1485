"""The command line: one small file per verb; the only place that joins training with artifacts."""
