"""Kernels over pages of any kind: what dense and compressed pages have in common."""
