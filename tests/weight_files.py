"""Weights of tiny checkpoints in the formats of others: AWQ, GPTQ, FP8, MXFP4, NVFP4 and more.

Each function takes the weights of a checkpoint under their names in the file, and gives what the
file has in their place, and the numbers that these stand for. All numbers are exact in bfloat16, in
which mlx-lm holds some of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of the codes of E2M1; bit 3 is the sign."""
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Output features in the order in which AWQ packs eight of them into 32 bits."""


def read_weights(folder: Path) -> Weights:
    """Every tensor of a folder's weight files."""
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """One weight file, in place of those that there are."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def converted(
    weights: Mapping[str, torch.Tensor],
    convert: Callable[[str, torch.Tensor], tuple[Weights, torch.Tensor]],
    chosen: Callable[[str], bool],
) -> tuple[Weights, Weights]:
    """(the file's tensors, the numbers they stand for), with the chosen weights converted.

    Weights whose rows are no multiple of 32 numbers stay as they are.
    """
    stored, exact = dict(weights), dict(weights)
    for name, weight in weights.items():
        if chosen(name) and weight.ndim >= 2 and weight.shape[-1] % 32 == 0:
            del stored[name]
            tensors, exact[name] = convert(name, weight.float())
            stored |= tensors
    return stored, exact


def is_projection(name: str) -> bool:
    """Linear layers of decoder layers; not the embeddings, the head, norms and routers."""
    return "_proj" in name and name.endswith("weight")


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.ceil(torch.log2(x.clamp(min=1e-8))))


def fp8_blocks(size: int = 128, scale_dtype: torch.dtype = torch.float32):
    """E4M3 with one scale for each block of rows and columns, as DeepSeek-V3 stores it."""

    def convert(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        rows, columns = (-(-n // size) for n in weight.shape)
        scale = torch.empty(rows, columns)
        full = torch.zeros_like(weight)
        codes = torch.empty_like(weight)
        for i in range(rows):
            for j in range(columns):
                part = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
                scale[i, j] = _power_of_two(weight[part].abs().max() / 448)
                codes[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn).float()
                full[part] = codes[part] * scale[i, j]
        stored = {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.to(scale_dtype)}
        return stored, full

    return convert


def fp8_tensor(suffix: str = "_scale_inv"):
    """E4M3 with one scale for the whole tensor."""

    def convert(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        scale = _power_of_two(weight.abs().max() / 448)
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}{suffix}": scale}, codes.float() * scale

    return convert


def mxfp8(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """E4M3 with an E8M0 exponent for each 32 numbers of a row."""
    groups = weight.unflatten(-1, (-1, 32))
    scale = _power_of_two(groups.abs().amax(-1, keepdim=True) / 448)
    codes = (groups / scale).to(torch.float8_e4m3fn)
    exact = (codes.float() * scale).flatten(-2)
    stored = {name: codes.flatten(-2), f"{name}_scale_inv": _e8m0(scale[..., 0])}
    return stored, exact


def _e8m0(scale: torch.Tensor) -> torch.Tensor:
    return (torch.log2(scale) + 127).to(torch.uint8)


def _fp4(weight: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest numbers of E2M1."""
    code = (weight.abs()[..., None] - FP4).abs().argmin(-1)
    return code | ((weight < 0).long() << 3)


def _fp4_value(codes: torch.Tensor) -> torch.Tensor:
    return FP4[codes & 7] * torch.where(codes & 8 > 0, -1.0, 1.0)


def mxfp4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(two codes in each byte [..., N / 2], exponents [..., N / 32], the numbers)."""
    groups = weight.unflatten(-1, (-1, 32))
    scale = _power_of_two(groups.abs().amax(-1, keepdim=True) / 6)
    codes = _fp4(groups / scale)
    exact = (_fp4_value(codes) * scale).flatten(-2)
    codes = codes.flatten(-2)
    packed = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
    return packed, _e8m0(scale[..., 0]), exact


def mxfp4_packed(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """As compressed-tensors stores it."""
    packed, scale, exact = mxfp4_groups(weight)
    return {f"{name}_packed": packed, f"{name}_scale": scale}, exact


def nvfp4(packed_suffix: str, scale_suffix: str, global_suffix: str, inverse: bool):
    """E2M1 with an E4M3 scale for each 16 numbers and a float32 scale for the tensor."""

    def convert(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        whole = torch.tensor(0.25)
        groups = weight.unflatten(-1, (-1, 16)) / whole
        scale = (groups.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn)
        codes = _fp4(groups / scale.float().clamp(min=1e-6))
        exact = (_fp4_value(codes) * scale.float() * whole).flatten(-2)
        codes = codes.flatten(-2)
        packed = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        stored = {
            f"{name}{packed_suffix}": packed,
            f"{name}{scale_suffix}": scale[..., 0],
            f"{name}{global_suffix}": 1 / whole if inverse else whole,
        }
        return stored, exact

    return convert


def nvfp4_experts(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """As Muse Spark stores its experts: the last scale for each expert, of gate and up apart."""
    stored, exact = nvfp4("", "_weight_scale", "_weight_scale_2", inverse=False)(name, weight)
    shape = (len(weight), 2) if "gate_up" in name else (len(weight),)
    stored[f"{name}_weight_scale_2"] = stored[f"{name}_weight_scale_2"].expand(shape)
    return stored, exact


def _affine(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, ...]:
    """(codes [out, groups, size], scales [out, groups], zero points [out, groups], numbers)."""
    groups = weight.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = _power_of_two((high - low) / 15)
    zero = torch.round(-low / scale).clamp(0, 15)
    codes = torch.round(groups / scale[..., None] + zero[..., None]).clamp(0, 15)
    exact = ((codes - zero[..., None]) * scale[..., None]).flatten(-2)
    return codes.long(), scale, zero.long(), exact


def _packed(codes: torch.Tensor, order: list[int] = range(8)) -> torch.Tensor:
    """Eight codes of the last axis into each 32 bits."""
    parts = codes.unflatten(-1, (-1, 8))[..., list(order)]
    words = (parts << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def awq(group_size: int = 32):
    """Four bits, input features in rows, output features packed in AWQ's order."""

    def convert(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        codes, scale, zero, exact = _affine(weight, group_size)
        base = name.removesuffix("weight")
        return {
            f"{base}qweight": _packed(codes.flatten(-2).T.contiguous(), AWQ_ORDER),
            f"{base}qzeros": _packed(zero.T.contiguous(), AWQ_ORDER),
            f"{base}scales": scale.T.to(torch.float16),
        }, exact

    return convert


def gptq(group_size: int = 32, g_idx: bool = True):
    """Four bits, input features packed, zero points less one."""

    def convert(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        codes, scale, zero, exact = _affine(weight, group_size)
        base = name.removesuffix("weight")
        stored = {
            f"{base}qweight": _packed(codes.flatten(-2)).T,
            f"{base}qzeros": _packed((zero.T - 1) & 15),
            f"{base}scales": scale.T.to(torch.float16),
        }
        if g_idx:
            index = torch.arange(weight.shape[1]) // group_size
            stored[f"{base}g_idx"] = index.to(torch.int32)
        return stored, exact

    return convert


def int4_packed(group_size: int = 32):
    """compressed-tensors' pack-quantized: four bits, symmetric, input features packed."""

    def convert(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        groups = weight.unflatten(-1, (-1, group_size))
        scale = _power_of_two(groups.abs().amax(-1) / 7)
        codes = torch.round(groups / scale[..., None]).clamp(-8, 7)
        exact = (codes * scale[..., None]).flatten(-2)
        return {
            f"{name}_packed": _packed((codes.long() + 8).flatten(-2)),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(weight.shape),
        }, exact

    return convert


def bitnet(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """Ternary: four rows in one row of bytes, and one scale that multiplies them."""
    scale = _power_of_two(weight.abs().mean())
    codes = torch.round(weight / scale).clamp(-1, 1)
    quarters = (codes + 1).to(torch.uint8).unflatten(0, (4, -1))
    packed = sum(quarter << (2 * i) for i, quarter in enumerate(quarters))
    base = name.removesuffix("weight")
    return {name: packed, f"{base}weight_scale": scale.reshape(1)}, codes * scale


def mxfp4_blocks(name: str, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """As gpt-oss stores its experts: [experts, out, groups, 16 bytes] and exponents."""
    packed, scale, exact = mxfp4_groups(weight)
    return {f"{name}_blocks": packed.unflatten(-1, (-1, 16)), f"{name}_scales": scale}, exact
