"""Every part of what results depend on tells a change of it."""

import os
from dataclasses import replace

import mlx.core as mx
import pytest

from vllm_metal.machine.device import Device
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.startup import dependencies
from vllm_metal.startup.dependencies import (
    of_compression_loss,
    of_forward_peaks,
    of_key_constants,
    of_server,
    sources_digest,
)

GPU = Device("metal", "Apple M4 Max", 1 << 36, 0)
CPU = Device("cpu", "x86_64 CPU", 1 << 34, 0)


@pytest.fixture
def folder(tmp_path):
    """A model as the Hugging Face hub keeps it: links into a folder of contents."""
    contents, model = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for path in (contents, model):
        path.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "modeling_own.py"):
        (contents / name).write_text(f"{{}} {name}")
        os.utime(contents / name, ns=(10**18, 10**18))
        (model / name).symlink_to(contents / name)
    return model


def server(
    folder, dtype: object = "bfloat16", device: Device = GPU, rope_theta: float = 10000.0
) -> dict:
    return of_server(folder, {"rope_theta": rope_theta}, dtype, device)


def test_the_same_is_the_same(folder):
    assert server(folder) == server(folder)
    assert of_key_constants([3], [1, 2], 5) == of_key_constants([3], [1, 2], 5)
    assert server(folder, device=replace(GPU, memory_in_use=5)) == server(folder)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda file: os.utime(file, ns=(10**18, 10**18 + 1)), id="time"),
        pytest.param(lambda file: file.write_text("longer" * 10), id="size"),
        pytest.param(lambda file: file.unlink(), id="gone"),
        pytest.param(lambda file: file.rename(file.with_name("other")), id="name"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "modeling_own.py"])
def test_files_of_the_model(folder, name, change):
    before = server(folder)
    change(folder / name)
    assert server(folder) != before


def test_the_settings_of_the_config_file(folder):
    """The file can be the same where `--hf-overrides` changes them."""
    assert server(folder, rope_theta=1e6) != server(folder)


def test_another_file_and_another_folder(folder):
    before = server(folder)
    (folder / "more.safetensors").write_text("")
    assert server(folder) != before
    (folder / "more.safetensors").unlink()
    assert server(folder) == before
    moved = folder.rename(folder.with_name("def"))
    assert server(moved) != before


def test_a_link_to_the_folder_is_the_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert server(tmp_path / "link") == server(folder)


@pytest.mark.parametrize(
    "change",
    [{"kind": "cuda"}, {"name": "Apple M5"}, {"memory_limit": 1 << 35}],
    ids=str,
)
def test_device(folder, change):
    assert server(folder, device=replace(GPU, **change)) != server(folder)


def test_dtype(folder):
    assert server(folder, mx.float16) != server(folder, mx.bfloat16)


@pytest.mark.parametrize("package", dependencies.PACKAGES)
def test_versions_of_packages(folder, monkeypatch, package):
    before = server(folder)
    real = dependencies.version
    changed = {package: "99"}
    monkeypatch.setattr(dependencies, "version", lambda name: changed.get(name) or real(name))
    assert server(folder) != before


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (dependencies, "SCHEMA", 99),
        (dependencies.vllm_metal, "__version__", "99"),
        (dependencies.platform, "platform", lambda: "macOS-99"),
        (dependencies, "sources_digest", lambda package: "99"),
    ],
    ids=["schema", "version", "system", "sources"],
)
def test_program_and_system(folder, monkeypatch, target, name, value):
    before = server(folder)
    monkeypatch.setattr(target, name, value)
    assert server(folder) != before


def test_settings_of_mlx(folder, monkeypatch):
    before = server(folder)
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert server(folder) != before


def test_the_blas_of_the_cpu(folder, monkeypatch):
    on_cpu, on_gpu = server(folder, device=CPU), server(folder)
    monkeypatch.setattr(dependencies, "load_fast_blas", lambda: "another")
    assert server(folder, device=CPU) != on_cpu
    assert server(folder) == on_gpu


def test_whether_the_cpu_backend_finds_a_compiler(folder, monkeypatch):
    found = []
    for path in (None, "/usr/bin/g++"):
        monkeypatch.setattr(dependencies.shutil, "which", lambda name, path=path: path)
        found.append((server(folder, device=CPU), server(folder)))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_sources(tmp_path):
    def digest() -> str:
        sources_digest.cache_clear()
        return sources_digest(tmp_path)

    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.py").write_text("")
    first = digest()
    (tmp_path / "notes.txt").write_text("")
    assert digest() == first
    (tmp_path / "a.py").write_text("x = 2")
    second = digest()
    (tmp_path / "b" / "c.py").rename(tmp_path / "b" / "d.py")
    assert len({first, second, digest()}) == 3
    sources_digest.cache_clear()


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_config": {"turboquant": True}},
        {"kv_cache_dtype": "bfloat16"},
        {"block_size": 32},
        {"max_model_len": 96},
        {"max_num_batched_tokens": 200},
        {"max_num_seqs": 4},
    ],
    ids=str,
)
def test_forward_peaks(make_config, settings):
    settings = {"skip_tokenizer_init": False} | settings
    found = of_forward_peaks(make_config(**settings))
    assert found != of_forward_peaks(make_config(skip_tokenizer_init=False))
    assert found == of_forward_peaks(make_config(**settings))


def test_key_constants():
    found = [
        of_key_constants(*each)
        for each in (
            ([], [1, 23], 5),
            ([], [12, 3], 5),
            ([], [1, 23, 4], 5),
            ([], [1, 23], 6),
            ([1], [23], 5),
            ([1], [1, 23], 5),
        )
    ]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_decode_answers():
    """They depend on the tokens that the tokenizer gives."""
    prompts = [[1, 2, 3], [1, 4]]
    assert dependencies.of_decode_answers(prompts) == dependencies.of_decode_answers(
        tuple(map(tuple, prompts))
    )
    assert dependencies.of_decode_answers(prompts) != dependencies.of_decode_answers([[2, 3], [4]])


def test_the_loss_depends_on_formats_dense_layers_and_their_type():
    pairs = [parse_pair("q8_0/q3_0"), parse_pair("q4_0/q3_0"), parse_pair("q8_0/q4_0")]
    plain = TurboQuantConfig(pairs[0])
    different = [TurboQuantConfig(pair) for pair in pairs]
    different += [TurboQuantConfig(pairs[0], boundary=1)]
    found = [of_compression_loss(config, 4, "float16") for config in different]
    found.append(of_compression_loss(plain, 4, "bfloat16"))
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    same = TurboQuantConfig(pairs[0], preset="k8v3", accepts_loss=True, skip_layers=())
    assert of_compression_loss(same, 4, "float16") == found[0]
    ends = TurboQuantConfig(pairs[0], skip_layers=(0, 3))
    assert of_compression_loss(ends, 4, "float16") == found[3]
