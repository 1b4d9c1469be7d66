"""A decode step's operators on CUDA: cuda.py launches Triton kernels, reference.py says in plain
torch what they give."""
