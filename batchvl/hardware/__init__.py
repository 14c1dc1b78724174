"""The CPUs, memory, GPUs and Slurm grant that this process may use."""
