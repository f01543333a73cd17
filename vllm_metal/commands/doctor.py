"""`vllm-metal doctor`: do the kernels give the right results on this machine, and how fast?

For every format pair that the docs show, it compiles the kernels, compares the bytes that they
store with the codec's, and compares attention and the dequantised keys and values with float32. The
kernels of dense pages are checked in the same way, against the bytes that MLX operations store, and
so are those operations. On a GPU it then times the attention layers of a decode step as the server
runs them. Where MLX has no GPU the kernels are compiled for the CPU and checked; their speed there
says nothing about a GPU, so it is not measured.
"""

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx

from vllm_metal import __version__
from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.commands.decode_timing import copy_gigabytes_per_second, time_steps
from vllm_metal.commands.doctor_report import PACKAGES, Report
from vllm_metal.commands.kernel_checks import DENSE, check_dense, check_kernels, fused_backend
from vllm_metal.commands.kernel_trial import dense_backend
from vllm_metal.errors import UserError
from vllm_metal.machine.device import Device, select_device
from vllm_metal.metal_kernel_backend.gpu_cores import core_count
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import Target, available_target
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS

BLOCK_SIZE = 16
KV_HEADS, KV_HEADS_ON_HOST = 8, 2
"""Fewer where the CPU runs the kernels, which takes a thousand times as long."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(map(str, SHOWN_PAIRS)),
        metavar="KEYS/VALUES",
        help="format pairs to check (default: all pairs of the documentation)",
    )
    parser.add_argument("--head-size", type=int, default=128, help="of keys and values")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found; returns 1 where a result is wrong or a kernel does not run.

    Raises:
        UserError: a format or the head size does not exist.
    """
    device = select_device()
    target = available_target() or HostTarget()
    kv_heads = KV_HEADS_ON_HOST if target.name == "host" else KV_HEADS
    layouts = {pair: _layout(pair, args.head_size, kv_heads) for pair in args.formats}
    shape = LayerShape(kv_heads, args.head_size, args.head_size)
    dense = [check_dense(shape, BLOCK_SIZE, kind) for kind in (None, target)]
    checks = [*dense, *check_kernels(layouts, target)]
    report = Report(machine_facts(device, target), shape, BLOCK_SIZE, checks)
    if report.ok and target.name != "host":
        backends: list[tuple[str, AttentionBackend]] = [
            (DENSE, dense_backend(shape, BLOCK_SIZE, mx.float16, target))
        ]
        backends += [(pair, fused_backend(layout, target)) for pair, layout in layouts.items()]
        try:
            report.copy_rate = copy_gigabytes_per_second()
            for step in time_steps(backends, device.memory_limit):
                report.steps.append(step)
        except Exception as error:  # what was found until then is worth a report
            report.timing_failure = f"{type(error).__name__}: {str(error)[:2000]}"
    print(json.dumps(report.as_dict()) if args.json else report.render())
    return 0 if report.ok else 1


def machine_facts(device: Device, target: Target) -> dict[str, str | int]:
    """What a report about this machine must name."""
    has_gpu = device.kind != "cpu"
    return {
        "device": device.name,
        "device_kind": device.kind,
        "architecture": str(mx.device_info().get("architecture", "")) if has_gpu else "",
        "gpu_cores": core_count(target) if has_gpu else 0,
        "memory_limit": device.memory_limit,
        "system": platform.platform(),
        "macos": platform.mac_ver()[0],
        "python": platform.python_version(),
        "vllm_metal": __version__,
        **{name: _installed(name) for name in PACKAGES},
        "kernels": target.name,
    }


def _layout(pair: str, head_size: int, kv_heads: int) -> PageLayout:
    try:
        return PageLayout(*parse_pair(pair), head_size, head_size, kv_heads, BLOCK_SIZE)
    except ValueError as error:
        raise UserError(f"--formats {pair} --head-size {head_size}: {error}") from error


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
