"""The paged KV cache: specs for vLLM's planner, the memory plan, and the pages themselves."""
