"""What the kernels of several operators share about how they are launched and run."""
