"""`kv_store` and `kv_store_gib`: the user's settings of pages on disk, checked.

They are keys of `--additional-config`, or of `kv_connector_extra_config` in `--kv-transfer-config`.
Both end in vLLM's `kv_transfer_config`, where vLLM's scheduler looks for a connector. The check
runs in every process, so nothing here imports MLX.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_metal.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PATH = "kv_store"
GIB = "kv_store_gib"
KEYS = (PATH, GIB)
DEFAULT_GIB = 50

CONNECTOR = "MetalKVConnector"
_MODULE = "vllm_metal.kv_store.connector"
_SPEC = "DiskSpec"
_SPEC_KEYS = ("spec_name", "spec_module_path")
"""By which vLLM finds the spec: `set_connector` sets them."""

_STABLE_HASHES = ("sha256", "sha256_cbor")
"""Values of `--prefix-caching-hash-algo` that give every process the same hashes."""


@dataclass(frozen=True)
class KVStoreSettings:
    """Where pages are kept on disk, and how much of it they may take."""

    folder: Path
    max_bytes: int


def problems(given: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with the two keys: one line each, naming the key, the value, what is allowed.

    Args:
        given: the settings that may hold the keys.
        where: the option that `given` is from, for the messages.
    """
    found = []
    path, gib = given.get(PATH), given.get(GIB)
    if PATH in given and not (isinstance(path, str) and path):
        found.append(f"{where}: {PATH}: {path!r} is not the path of a folder")
    elif isinstance(path, str) and Path(path).expanduser().exists():
        if not Path(path).expanduser().is_dir():
            found.append(f"{where}: {PATH}: {path!r} is a file (allowed: the path of a folder)")
    if GIB in given and not _is_size(gib):
        found.append(f"{where}: {GIB}: {gib!r} is not a size (allowed: a number of GiB above 0)")
    if GIB in given and PATH not in given:
        found.append(f'{where}: {GIB}: no effect without "{PATH}"')
    return found


def is_asked_for(vllm_config: "VllmConfig") -> bool:
    """Whether pages are to be kept on disk, in one option or the other."""
    return vllm_config.kv_transfer_config is not None or PATH in _additional(vllm_config)


def refusals(vllm_config: "VllmConfig") -> list[str]:
    """Why pages cannot be kept on disk as asked for; nothing where nobody asks."""
    if not is_asked_for(vllm_config):
        return []
    transfer, found = vllm_config.kv_transfer_config, []
    if transfer is not None:
        if transfer.kv_connector != CONNECTOR:
            return [
                f"--kv-transfer-config kv_connector {transfer.kv_connector} is not supported "
                f"(allowed: {CONNECTOR}, which keeps pages on disk)"
            ]
        extra, where = transfer.kv_connector_extra_config, "--kv-transfer-config"
        found += problems(extra, where)
        found += [
            f"{where}: kv_connector_extra_config: unknown key {key!r} (allowed: {', '.join(KEYS)})"
            for key in extra
            if key not in (*KEYS, *_SPEC_KEYS)
        ]
        if PATH not in extra:
            found.append(f"{where}: kv_connector_extra_config has no {PATH!r}, the folder of pages")
        elif PATH in _additional(vllm_config) and not _is_own(vllm_config):
            found.append(f"{PATH} is in --additional-config and in {where}: give it in one place")
        if transfer.kv_role != "kv_both":
            found.append(f"{where}: kv_role {transfer.kv_role} is not supported (allowed: kv_both)")
    cache = vllm_config.cache_config
    if not cache.enable_prefix_caching:
        found.append(f"{PATH} needs prefix caching: leave --no-enable-prefix-caching out")
    if vllm_config.speculative_config is not None:
        found.append(
            f"--speculative-config is not supported with {PATH}: whether a block may hold drafts "
            "that turn out wrong when it is written has not been tested"
        )
    algorithm = cache.prefix_caching_hash_algo
    if algorithm not in _STABLE_HASHES and "PYTHONHASHSEED" not in os.environ:
        found.append(
            f"--prefix-caching-hash-algo {algorithm} is not supported with {PATH}: its hashes "
            f"differ from process to process (allowed: {', '.join(_STABLE_HASHES)}, or any with "
            "PYTHONHASHSEED set)"
        )
    return found


def set_connector(vllm_config: "VllmConfig", has_state: bool) -> None:
    """Completes `kv_transfer_config` where pages are to be kept on disk.

    A load that fails is computed anew; vLLM's default would end the request with an error.

    Raises:
        UserError: the model has recurrent state.
    """
    if has_state and is_asked_for(vllm_config):
        raise UserError(
            f"{PATH} is not supported for {vllm_config.model_config.model}: it has recurrent "
            "state, which is not kept on disk"
        )
    from vllm.config import KVTransferConfig

    given = _additional(vllm_config)
    if vllm_config.kv_transfer_config is None and PATH in given:
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_role="kv_both",
            kv_connector_extra_config={key: given[key] for key in KEYS if key in given},
        )
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return
    transfer.kv_connector_module_path = _MODULE
    transfer.kv_load_failure_policy = "recompute"
    transfer.kv_connector_extra_config |= dict(zip(_SPEC_KEYS, (_SPEC, _MODULE), strict=True))


def settings(vllm_config: "VllmConfig") -> KVStoreSettings | None:
    """Of a configuration that has been checked and completed; None where nothing is kept."""
    transfer = vllm_config.kv_transfer_config
    return None if transfer is None else of_extra_config(transfer.kv_connector_extra_config)


def of_extra_config(extra: Mapping[str, Any]) -> KVStoreSettings:
    """The settings in `kv_connector_extra_config`."""
    folder = Path(extra[PATH]).expanduser().absolute()
    return KVStoreSettings(folder, int(extra.get(GIB, DEFAULT_GIB) * (1 << 30)))


def _is_size(gib: object) -> bool:
    is_number = isinstance(gib, int | float) and not isinstance(gib, bool)
    return is_number and 0 < gib < float("inf")  # type: ignore[operator]


def _additional(vllm_config: "VllmConfig") -> Mapping[str, Any]:
    given = vllm_config.additional_config
    return given if isinstance(given, Mapping) else {}


def _is_own(vllm_config: "VllmConfig") -> bool:
    """Whether `set_connector` has made the connector of `additional_config` by now.

    vLLM checks a configuration in the main process and again in the engine's.
    """
    given, transfer = _additional(vllm_config), vllm_config.kv_transfer_config
    extra = transfer.kv_connector_extra_config if transfer else {}
    return _SPEC_KEYS[0] in extra and all(extra.get(key) == given.get(key) for key in KEYS)
