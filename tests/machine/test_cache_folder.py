"""One folder for what is made once, whoever makes it."""

from pathlib import Path

from vllm_metal.machine.cache_folder import cache_folder


def test_the_users_cache(monkeypatch):
    for unset in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if unset is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == Path.home() / ".cache" / "vllm_metal"


def test_another_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vllm_metal"
