"""Pages of the KV cache on disk, which survive a restart."""
