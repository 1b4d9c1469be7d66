"""Artifacts for CUDA: compiled kernels, and for each method the list of their launches."""
