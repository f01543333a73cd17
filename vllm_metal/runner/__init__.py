"""One step of the engine: scheduled requests in, sampled tokens out."""
