"""The key of a file: a digest of all that its bytes depend on, beside the tokens.

vLLM's hash of a block, from which the file has its name, depends on the tokens of the block, on
those before it and on the request's cache salt. All else is in the key, and the key is in the name
of the folder and in the header of each file. So a file of another model, or of other settings, is
not found, and would not be accepted.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from vllm.v1.kv_offload.file_mapper import FileMapper

from vllm_metal.kv_store.page_file import MAGIC
from vllm_metal.options import kv_store

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_metal.attention.backend import AttentionBackend
    from vllm_metal.kv_cache.cache import KVCache


def digest(vllm_config: "VllmConfig", kv_cache: "KVCache", of_server: Mapping[str, Any]) -> str:
    """The key of this model under these settings, 64 hex digits.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache: the pages.
        of_server: files of the model and versions of the code that computes keys and values.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    additional = vllm_config.additional_config
    given = dict(additional) if isinstance(additional, Mapping) else {}
    content = {
        "form": MAGIC.decode(),
        "server": {name: value for name, value in of_server.items() if name != "device"},
        "model": [str(model.dtype), model.revision, model.max_model_len],
        "settings": {k: v for k, v in given.items() if k not in kv_store.KEYS},
        "kv_cache_dtype": cache.cache_dtype,
        "hash": [
            cache.prefix_caching_hash_algo,
            os.environ.get("PYTHONHASHSEED"),
            sys.version_info[:2],  # "sha256" hashes what pickle makes of the tokens
        ],
        "groups": [repr(group) for group in kv_cache.groups],
        "block_bytes": [kv_cache.block_bytes(i) for i in range(len(kv_cache.groups))],
        "layers": [_layer(backend) for backend in kv_cache.backends],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def file_mapper(folder: Path, key: str) -> FileMapper:
    """vLLM's names of files in a folder, under this key."""
    return FileMapper(
        root_dir=str(folder),
        model_name="pages",
        tokens_per_hash=0,  # this and what follows is in the key
        blocks_per_file=1,
        tp_size=1,
        pp_size=1,
        pcp_size=1,
        dcp_size=1,
        rank=0,
        dtype="",
        inference_engine="vllm_metal",
        canonical_format=key,
    )


def _layer(backend: "AttentionBackend") -> list[str]:
    """Form of a layer's pages, and the constants that its codes mean nothing without."""
    constants = hashlib.sha256()
    for array in _constants(backend):
        constants.update(np.array(array.astype(mx.float32)).tobytes())
    form = backend.block_size, backend.page_size_bytes, backend.slot_size, backend.format_names
    return [backend.name, repr(backend.shape), repr(form), constants.hexdigest()]


def _constants(backend: "AttentionBackend") -> Sequence[mx.array]:
    codec = getattr(backend, "key_codec", None)
    return [] if codec is None else [codec.centre, codec.key_factors]
