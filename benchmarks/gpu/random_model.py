"""Writes a random Llama with the shape of a 3B model, and the demo model's tokenizer, to a folder.

    python benchmarks/gpu/random_model.py OUT_FOLDER [--layers 28] [--bits 4]

5.9 GB in bfloat16; with `--bits 4`, quantised as mlx-lm does it. Speed depends on shapes alone, so
random weights will do. The tokenizer is there because TurboQuant reads a text to calibrate its
keys.
"""

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from vllm_metal.commands.demo_model import fetch_demo_model

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the weights")
    arguments = parser.parse_args()
    config = CONFIG | {"num_hidden_layers": arguments.layers}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if arguments.bits:
        settings = {"group_size": 64, "bits": arguments.bits}
        nn.quantize(model, **settings)
        config["quantization"] = settings
    mx.eval(model.parameters())
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(arguments.out / "model.safetensors"), weights, {"format": "mlx"})
    (arguments.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer = fetch_demo_model()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, arguments.out / name)
    size = sum(array.nbytes for array in weights.values())
    print(f"{arguments.out}: {size / 1e9:.2f} GB of weights, {arguments.layers} layers")


if __name__ == "__main__":
    main()
