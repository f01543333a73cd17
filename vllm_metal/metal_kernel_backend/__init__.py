"""Attention backends whose pages live in MLX arrays, and the kernels that read them."""
