"""Kernels, one operation a file: what callers need, its reference in plain PyTorch, and beside it the Triton code."""
