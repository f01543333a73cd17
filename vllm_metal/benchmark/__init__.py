"""`vllm-metal bench`: how fast this machine serves a model, with dense and compressed pages, beside
mlx-lm's own generation.

    command   arguments; one process for each engine, so that none holds another one's memory
    engines   what is compared: vLLM with this plugin's pages, and mlx-lm
    timing    one case: prompts in, first tokens, decode steps
    report    the table and the plot
"""
