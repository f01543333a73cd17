"""What becomes of each of vLLM's options on this platform."""
