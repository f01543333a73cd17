"""How the KV cache is compressed: formats, layers left dense."""

from dataclasses import dataclass

from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair


@dataclass(frozen=True)
class TurboQuantConfig:
    """How the KV cache is compressed."""

    formats: FormatPair
    preset: str | None = None
    """The name by which the user chose the formats as a pair; None for formats named singly."""
    skip_layers: tuple[int, ...] = ()
    """Indices of layers kept dense."""
    boundary: int = 0
    """Layers kept dense at each end of the model."""
    accepts_loss: bool = False
    """Whether the server starts whatever the formats cost the model (`allow_lossy`)."""
    reproducible: bool = False
    """A prefill chunk reads its own keys and values compressed, so that tokens do not depend on
    chunking, prefix-cache hits or preemption, up to rounding; costs quality."""

    def skipped(self, num_layers: int) -> frozenset[int]:
        """Indices of all layers kept dense, of a model with `num_layers` attention layers.

        Raises:
            UserError: an index is not a layer.
        """
        wrong = [layer for layer in self.skip_layers if layer >= num_layers]
        if wrong:
            raise UserError(
                "additional_config is not valid",
                [f"skip_layers names layer {wrong[0]} (allowed: 0 to {num_layers - 1})"],
            )
        ends = range(self.boundary), range(num_layers - self.boundary, num_layers)
        return frozenset(self.skip_layers).union(*ends) & frozenset(range(num_layers))
