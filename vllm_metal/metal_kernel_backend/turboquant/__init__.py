"""TurboQuant: a KV cache of small codes, one float16 scale per vector, after a rotation."""
