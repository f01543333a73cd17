"""vLLM's shutdown does not reach the accelerator that torch may have."""

import inspect
import re

import pytest
import torch
from vllm.distributed import parallel_state

from vllm_metal.errors import ChangedLibraryError
from vllm_metal.machine.torch_accelerator import disable_cache_release


@pytest.mark.parametrize("available", [False, True])
def test_vllms_shutdown_leaves_the_accelerator_alone(make_config, monkeypatch, available):
    """It would fail where there is none, and crash on Apple's."""

    def crash() -> None:
        raise AssertionError("the accelerator was touched")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch.accelerator, "empty_cache", crash)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", crash)
    make_config()
    torch.accelerator.empty_cache()
    torch.accelerator.empty_host_cache()


def test_a_torch_without_these_functions_is_named(monkeypatch):
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    with pytest.raises(ChangedLibraryError, match=r"torch .*torch\.accelerator\.empty_host_cache"):
        disable_cache_release()


def test_vllms_shutdown_calls_nothing_else_of_the_accelerator():
    shutdown = inspect.getsource(parallel_state.cleanup_dist_env_and_memory)
    called = {*re.findall(r"accelerator\.(\w+)\(", shutdown)}
    assert called == {"empty_cache", "empty_host_cache"}
