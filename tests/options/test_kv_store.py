"""`kv_store` in both options: refused with the reason, or turned into vLLM's connector."""

from pathlib import Path

import pytest

from vllm_metal.errors import UserError
from vllm_metal.options.kv_store import problems, settings
from vllm_metal.platform import MetalPlatform


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"kv_store": 3}, "kv_store: 3 is not the path of a folder"),
        ({"kv_store": ""}, "kv_store: '' is not the path"),
        ({"kv_store": __file__}, "is a file (allowed: the path of a folder)"),
        ({"kv_store": "/a", "kv_store_gib": 0}, "kv_store_gib: 0 is not a size (allowed: a numb"),
        ({"kv_store": "/a", "kv_store_gib": True}, "kv_store_gib: True is not a size"),
        ({"kv_store": "/a", "kv_store_gib": "5"}, "kv_store_gib: '5' is not a size"),
        ({"kv_store": "/a", "kv_store_gib": float("inf")}, "kv_store_gib: inf is not a size"),
        ({"kv_store_gib": 5}, 'kv_store_gib: no effect without "kv_store"'),
    ],
    ids=str,
)
def test_mistakes_are_named(given, reason):
    [problem] = problems(given, "additional_config")
    assert problem.startswith("additional_config: ") and reason in problem


def test_the_short_option_becomes_vllms_connector(make_config, tmp_path):
    config = make_config(additional_config={"kv_store": str(tmp_path), "kv_store_gib": 0.5})
    transfer = config.kv_transfer_config
    assert transfer.kv_connector == "MetalKVConnector"
    assert transfer.kv_load_failure_policy == "recompute"
    found = settings(config)
    assert found is not None
    assert (found.folder, found.max_bytes) == (tmp_path, 1 << 29)
    before = repr(config)
    MetalPlatform.check_and_update_config(config)  # as in the engine's process
    assert repr(config) == before


def test_vllms_own_option_gives_the_same(make_config, tmp_path):
    given = {
        "kv_connector": "MetalKVConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kv_store": str(tmp_path)},
    }
    own = make_config(kv_transfer_config=given)
    short = make_config(additional_config={"kv_store": str(tmp_path)})
    assert settings(own) == settings(short)
    own.kv_transfer_config.engine_id = short.kv_transfer_config.engine_id
    assert repr(own.kv_transfer_config) == repr(short.kv_transfer_config)


def test_nothing_is_kept_unless_asked(make_config):
    assert settings(make_config()) is None


def test_a_home_folder_is_meant(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = settings(make_config(additional_config={"kv_store": "~/pages"}))
    assert found is not None and found.folder == tmp_path / "pages"
    assert found.max_bytes == 50 << 30
    assert not Path(found.folder).exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"enable_prefix_caching": False}, "kv_store needs prefix caching: leave --no-enable"),
        ({"prefix_caching_hash_algo": "xxhash"}, "--prefix-caching-hash-algo xxhash is not supp"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "MetalKVConnector",
                    "kv_role": "kv_consumer",
                    "kv_connector_extra_config": {"blocks_per_chunk": 2},
                }
            },
            "unknown key 'blocks_per_chunk' (allowed: kv_store, kv_store_gib)",
        ),
    ],
    ids=["no prefix caching", "random hashes", "other keys"],
)
def test_configurations_that_are_refused(make_config, monkeypatch, changes, reason):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError) as error:
        make_config(**({"additional_config": {"kv_store": "/a"}} | changes))
    assert reason in str(error.value)


def test_recurrent_state_is_refused_by_name(make_config, tmp_path):
    from tests.tiny_models import save_checkpoint

    folder = save_checkpoint(tmp_path / "jamba", "jamba", architectures=["JambaForCausalLM"])
    with pytest.raises(UserError, match="kv_store is not supported for .*: it has recurrent state"):
        make_config(model=str(folder), additional_config={"kv_store": "/a"})
