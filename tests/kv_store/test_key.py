"""The key changes with everything that the bytes of a block depend on, and with nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.attention.backend import LayerShape
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_store import key as keys
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

SHAPE = LayerShape(num_kv_heads=2, head_size=64, head_size_v=64)
CENTRE = np.zeros((2, 64), np.float32)
ONES = np.ones((2, 64), np.float32)
SERVER = {"model": {"files": {"a": [1, 2]}}, "packages": {"mlx": "1"}, "device": {"name": "x"}}


def config(**changes) -> SimpleNamespace:
    cache = {"cache_dtype": "auto", "prefix_caching_hash_algo": "sha256"}
    model = {"dtype": "float16", "revision": None, "max_model_len": 128}
    additional = {"kv_store": "/a", "kv_store_gib": 5, "turboquant": True}
    for part in (cache, model, additional):
        part |= {name: value for name, value in changes.items() if name in part}
    return SimpleNamespace(
        cache_config=SimpleNamespace(**cache),
        model_config=SimpleNamespace(**model),
        additional_config=additional,
    )


def compressed(
    formats: str = "q8_0/q3_0", constants=(CENTRE, ONES), block_size: int = 16
) -> KVCache:
    pages = TurboQuantReference(SHAPE, block_size, parse_pair(formats), KeyConstants(*constants))
    return KVCache([pages], 3)


def dense(dtype: mx.Dtype = mx.float16, block_size: int = 16, shape=SHAPE) -> KVCache:
    return KVCache([DensePages(shape, block_size, dtype)], 3)


def digest(cache: KVCache | None = None, server=SERVER, **changes) -> str:
    return keys.digest(config(**changes), cache or dense(), server)


def nudged(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[1, 5] = np.nextafter(changed[1, 5], np.float32(2))
    return changed


def test_a_second_start_has_the_same_key():
    assert digest() == digest()
    assert digest(compressed()) == digest(compressed())


def test_the_place_and_size_of_the_store_do_not_count():
    assert digest(kv_store="/b", kv_store_gib=1) == digest()


def test_another_amount_of_memory_does_not_count():
    assert digest(server=SERVER | {"device": {"name": "x", "memory_limit": 3}}) == digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"revision": "main"},
        {"max_model_len": 256},
        {"cache_dtype": "bfloat16"},
        {"prefix_caching_hash_algo": "sha256_cbor"},
        {"turboquant": False},
        {"server": SERVER | {"model": {"files": {"a": [1, 3]}}}},
        {"server": SERVER | {"packages": {"mlx": "2"}}},
        {"cache": dense(mx.float32)},
        {"cache": dense(block_size=32)},
        {"cache": dense(shape=replace(SHAPE, sliding_window=32))},
        {"cache": compressed()},
    ],
)
def test_other_settings_have_other_keys(changes):
    assert digest(**changes) != digest()


@pytest.mark.parametrize(
    "cache",
    [
        compressed("q8_0/q4_0"),
        compressed(constants=(nudged(CENTRE), ONES)),
        compressed(constants=(CENTRE, nudged(ONES))),
        compressed(block_size=32),
    ],
    ids=["format", "centre", "multiplier", "block size"],
)
def test_formats_and_constants_are_in_the_key(cache):
    """To the last bit: codes mean nothing with other constants."""
    assert digest(cache) != digest(compressed())


def test_the_seed_of_hashes_is_in_the_key(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    before = digest()
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert digest() != before


def test_names_of_files_hold_key_hash_and_group(tmp_path):
    def name(key="k", block=b"\1", group=0) -> str:
        return keys.file_mapper(tmp_path, key).get_file_name(block * 32 + bytes([0, 0, 0, group]))

    assert name() == name()
    assert len({name(), name(key="l"), name(block=b"\2"), name(group=1)}) == 4
