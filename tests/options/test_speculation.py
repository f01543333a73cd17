"""What of `--speculative-config` is served, and what is refused by name."""

import re

import pytest

from tests.tiny_models import save_checkpoint
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.paged.launcher import MAX_QUERY_TOKENS
from vllm_metal.options import speculation
from vllm_metal.options.speculation import MOST_DRAFTS

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}


def test_n_grams_are_served_step_by_step(make_config):
    config = make_config(speculative_config=NGRAM)
    assert config.scheduler_config.async_scheduling is False
    assert config.scheduler_config.scheduler_cls == "vllm_metal.scheduler.MetalScheduler"


def test_the_kernels_take_as_many_drafts():
    assert MOST_DRAFTS == MAX_QUERY_TOKENS - 1


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"num_speculative_tokens": 8, "rejection_sample_method": "block"},
            ["num_speculative_tokens 8", "allowed: 1 to 7", "rejection_sample_method block"],
        ),
        ({"method": "ngram_gpu"}, ["method 'ngram_gpu'", "allowed: ngram, suffix"]),
        ({"method": "custom_class", "model": "a.B"}, ["method 'custom_class'"]),
        ({"method": "medusa", "model": "same"}, ["method 'medusa'", "mlx-lm does not load"]),
        ({"method": "draft_model", "model": "same"}, ["method 'draft_model'", "no second model"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_all_reasons_are_named(make_config, checkpoint, changes, names):
    given = NGRAM | changes
    if given.get("model") == "same":
        given["model"] = str(checkpoint)
    with pytest.raises(UserError) as refusal:
        make_config(speculative_config=given)
    assert all(name in str(refusal.value) for name in names)


def test_recurrent_models_are_refused(make_config, tmp_path):
    folder = save_checkpoint(tmp_path / "m", "jamba", architectures=["JambaForCausalLM"])
    for caching in (True, False):
        with pytest.raises(UserError, match="--speculative-config.*recurrent state"):
            make_config(model=str(folder), speculative_config=NGRAM, enable_prefix_caching=caching)


def test_models_that_take_one_position_are_refused(make_config):
    config = make_config(speculative_config=NGRAM)
    with pytest.raises(UserError, match=re.escape("one position in a forward pass")):
        speculation.require_batches(config, "its mask does not fit")
    speculation.require_batches(make_config(), "its mask does not fit")
