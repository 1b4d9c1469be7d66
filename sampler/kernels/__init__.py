"""The sampler on CUDA: operator.py launches the Triton kernels, one file for each subject."""
