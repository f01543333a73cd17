"""`vllm-metal eval`: what a format pair loses, through the real backends' store and decode."""
