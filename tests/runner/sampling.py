"""What is decided about vLLM's sampling, field for field, and logits processors to install."""

from vllm.v1.sample.logits_processor import LogitsProcessor

ASK_SAMPLER = "sampler"
IRRELEVANT = "irrelevant"
SAMPLING_PARAMS = {
    **dict.fromkeys(
        (
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature"),
            *("min_tokens", "logprobs", "logprob_token_ids", "logit_bias", "allowed_token_ids"),
            *("bad_words", "_bad_words_token_ids", "thinking_token_budget", "extra_args"),
        ),
        ASK_SAMPLER,
    ),
    **dict.fromkeys(("top_p", "top_k", "min_p", "seed"), IRRELEVANT),  # at temperature 0
    **dict.fromkeys(("structured_outputs", "prompt_logprobs"), IRRELEVANT),  # in the model runner
    **dict.fromkeys(  # of the front end and the scheduler
        (
            *("n", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "flat_logprobs"),
            *("detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
            *("include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone"),
            *("output_text_buffer_length", "_eos_token_id", "_all_stop_token_ids"),
            *("skip_reading_prefix_cache", "repetition_detection"),
        ),
        IRRELEVANT,
    ),
    **dict.fromkeys(  # refused with the option that they need: Model Runner V2 has it alone
        (
            *("watermarking", "_watermarking_skipped", "prompt_logprob_token_ids"),
            *("prompt_logprob_start", "trace_decode_token_ids", "routed_experts_prompt_start"),
        ),
        IRRELEVANT,
    ),
}
"""Every field of vLLM's `SamplingParams`, and whether it may change what a greedy request samples,
or what is reported of it."""

METADATA = {
    "temperature": IRRELEVANT,  # `all_greedy`
    "all_greedy": ASK_SAMPLER,
    "all_random": IRRELEVANT,
    "top_p": IRRELEVANT,
    "top_k": IRRELEVANT,
    "generators": IRRELEVANT,
    "max_num_logprobs": ASK_SAMPLER,
    "no_penalties": ASK_SAMPLER,
    "prompt_token_ids": IRRELEVANT,  # of penalties, as the next four
    "frequency_penalties": IRRELEVANT,
    "presence_penalties": IRRELEVANT,
    "repetition_penalties": IRRELEVANT,
    "output_token_ids": IRRELEVANT,
    "allowed_token_ids_mask": ASK_SAMPLER,
    "bad_words_token_ids": ASK_SAMPLER,
    "logitsprocs": ASK_SAMPLER,
    "logprob_token_ids": ASK_SAMPLER,
    "spec_token_ids": IRRELEVANT,
    "thinking_budget_state_holder": ASK_SAMPLER,
}
"""Every field of vLLM's `SamplingMetadata`, and whether `needs_torch` asks it."""


class Forces5(LogitsProcessor):
    """Every request samples token 5."""

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        logits[:] = float("-inf")
        logits[:, 5] = 0
        return logits


class Sharpens(Forces5):
    """Leaves the order of the logits as it is."""

    def is_argmax_invariant(self):
        return True

    def apply(self, logits):
        return logits.mul_(2)
