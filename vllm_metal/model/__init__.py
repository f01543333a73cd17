"""The mlx-lm side: loads an unmodified model and binds its caches to paged attention."""
