"""One folder for what is made once, whoever makes it."""

from pathlib import Path

import pytest

from vllm_metal.errors import UserError
from vllm_metal.machine.cache_folder import (
    STARTUP_CACHE_VARIABLE,
    cache_folder,
    startup_cache_folder,
)


def test_the_users_cache(monkeypatch):
    for unset in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if unset is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == Path.home() / ".cache" / "vllm_metal"


def test_another_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vllm_metal"


def test_results_of_starts_are_kept_unless_that_is_switched_off(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(STARTUP_CACHE_VARIABLE, raising=False)
    assert startup_cache_folder() == tmp_path / "vllm_metal" / "startup"
    monkeypatch.setenv(STARTUP_CACHE_VARIABLE, "on")
    assert startup_cache_folder() == tmp_path / "vllm_metal" / "startup"
    monkeypatch.setenv(STARTUP_CACHE_VARIABLE, "off")
    assert startup_cache_folder() is None


@pytest.mark.parametrize("value", ["", "0", "no", "ON"])
def test_other_values_are_refused(monkeypatch, value):
    monkeypatch.setenv(STARTUP_CACHE_VARIABLE, value)
    with pytest.raises(UserError, match=f"VLLM_METAL_STARTUP_CACHE='{value}' .*allowed: on, off"):
        startup_cache_folder()
