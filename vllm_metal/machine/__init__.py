"""Facts of this machine: MLX's device, the BLAS behind its CPU backend, the cache folder."""
