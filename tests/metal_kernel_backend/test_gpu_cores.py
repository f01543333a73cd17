"""The number of cores: what macOS or MLX tell, and what is assumed where neither does."""

import subprocess

import mlx.core as mx
import pytest

from vllm_metal.metal_kernel_backend import gpu_cores
from vllm_metal.metal_kernel_backend.gpu_cores import core_count, parse_core_count
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget, MetalTarget

M1_MAX = """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x100000398, registered, matched>
    {
      "IOClass" = "AGXAcceleratorG13X"
      "MetalPluginName" = "AGXMetalG13X"
      "gpu-core-count" = 32
      "model" = "Apple M1 Max"
      "GPUConfigurationVariable" = {"num_gps"=16,"gpu_gen"=13,"usc_gen"=2,"num_cores"=32}
    }
"""


@pytest.fixture
def on_a_mac(monkeypatch):
    """A Mac whose `ioreg` prints what the test returns or raises."""

    def pretend(printed: str | OSError, architecture: str = "applegpu_g13s") -> None:
        def run(command, **_):
            assert command[0].endswith("ioreg")
            if isinstance(printed, OSError):
                raise printed
            return subprocess.CompletedProcess(command, 0, printed, "")

        monkeypatch.setattr(gpu_cores.sys, "platform", "darwin")
        monkeypatch.setattr(gpu_cores.subprocess, "run", run)
        monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
        gpu_cores._told_by_macos.cache_clear()

    yield pretend
    gpu_cores._told_by_macos.cache_clear()


def test_the_count_in_what_ioreg_prints():
    assert parse_core_count(M1_MAX) == 32
    assert parse_core_count('      "gpu-core-count"=8\n') == 8
    assert parse_core_count("") is None
    assert parse_core_count('"num_cores"=32') is None


def test_macos_tells_the_cores_of_a_mac(on_a_mac):
    on_a_mac(M1_MAX)
    assert core_count(MetalTarget()) == 32


@pytest.mark.parametrize(
    ("architecture", "cores"),
    [("applegpu_g13g", 20), ("applegpu_g14s", 40), ("applegpu_g15d", 80), ("g17p", 6), ("", 40)],
)
@pytest.mark.parametrize("printed", ["", FileNotFoundError("ioreg")], ids=["nothing", "no ioreg"])
def test_without_it_the_architecture_tells_the_most_that_a_chip_has(
    on_a_mac, printed, architecture, cores
):
    on_a_mac(printed, architecture)
    assert core_count(MetalTarget()) == cores


def test_mlx_tells_the_multiprocessors_of_an_nvidia_gpu(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"multi_processor_count": 78})
    assert core_count(CudaTarget()) == 78
    monkeypatch.setattr(mx, "device_info", dict)
    assert core_count(CudaTarget()) == 132


def test_the_cpu_is_one_core():
    assert core_count(HostTarget()) == 1
