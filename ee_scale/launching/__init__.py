"""Starting runs: ranks on this machine, scripts for torchrun and SLURM, and what goes on around a run."""
