"""The kinds of model that the engine is tested with: one tiny random model each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tiny_models import save_checkpoint, save_tokenizer


@dataclass(frozen=True)
class Kind:
    """A model of `tiny_architectures`, and what the engine is to do with it."""

    name: str
    architecture: str
    scarce_blocks: int | None = 7
    """A pool that holds one request of 96 tokens and little more, of dense pages; None where a
    request has all that it will ever need from its beginning."""
    caches_prefixes: bool = True
    """Whether it does so by default; where False, vLLM does if it is asked to."""
    no_turboquant: str = ""
    """Why TurboQuant refuses it, where it does."""
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    """Arguments for `save_checkpoint`."""

    def __str__(self) -> str:
        heads = f"-heads of {self.changes['head_dim']}" if "head_dim" in self.changes else ""
        return self.name + "-4bit" * ("quantization" in self.changes) + heads

    def save(self, folder: Path) -> Path:
        """Writes the checkpoint, with a tokenizer; returns its folder."""
        save_checkpoint(folder, self.name, architectures=[self.architecture], **self.changes)
        save_tokenizer(folder)
        return folder


FOUR_BITS = {"quantization": {"group_size": 32, "bits": 4}}
THREE_LAYERS = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "sliding_window": 16,
    "sliding_window_pattern": 3,
}
"""Two windows of one block and a layer of full attention."""
NOTHING = "it has no keys and values"
LATENT = "layer 0: its cache holds a latent (MLA)"

KINDS = [
    # plain, and from a quantised checkpoint
    Kind("llama", "LlamaForCausalLM"),
    Kind("llama", "LlamaForCausalLM", changes=FOUR_BITS),
    # heads so long that compressed keys have levels
    Kind("qwen3", "Qwen3ForCausalLM", changes={"head_dim": 128}),
    # mixture of experts
    Kind("mixtral", "MixtralForCausalLM"),
    # sliding windows, and with sinks
    Kind("gemma3_text", "Gemma3ForCausalLM", 19, changes=THREE_LAYERS),
    Kind("olmo3", "Olmo3ForCausalLM", 16),
    Kind("gpt_oss", "GptOssForCausalLM", 16),
    # hybrids with a gated delta net and with Mamba; recurrent state only
    Kind("qwen3_next", "Qwen3NextForCausalLM"),
    Kind("jamba", "JambaForCausalLM"),
    Kind("falcon_h1", "FalconH1ForCausalLM", 10),
    Kind("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    Kind("mamba", "MambaForCausalLM", None, caches_prefixes=False, no_turboquant=NOTHING),
    # shared keys and values; afm7 is unknown to vLLM and decodes one request at a time
    Kind("afm7", "AFMForCausalLM"),
    # head sizes by layer, in windows and full attention: with shared layers, and with experts
    Kind("gemma4_shared", "Gemma4ForCausalLM", 8),
    Kind("gemma4_26b_a4b", "Gemma4ForCausalLM", 16),
    # another number of KV heads in every layer
    Kind("openelm", "OpenELMForCausalLM"),
    # soft-capped scores, one request at a time
    Kind("gemma2", "Gemma2ForCausalLM"),
    # MLA that caches whole heads, keys and values of unequal sizes; that caches a latent; and with
    # an index, two caches in a layer
    Kind("minicpm3", "MiniCPM3ForCausalLM"),
    Kind("deepseek_v3", "DeepseekV3ForCausalLM", no_turboquant=LATENT),
    Kind("deepseek_v32", "DeepseekV32ForCausalLM", no_turboquant=LATENT),
]
