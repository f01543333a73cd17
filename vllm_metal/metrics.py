"""What the KV cache is made of, at `/metrics`.

vLLM loads this class through the entry point group `vllm.stat_logger_plugins` in the API server.
The figures are the start-up report's: computed from the model's config file and the page layouts,
never from a second formula.
"""

from typing import TYPE_CHECKING

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_metal.metal_kernel_backend.selection import neutral_constants
from vllm_metal.model import model_loader
from vllm_metal.model_pages import ModelPages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GAUGES = {
    "num_layers": "attention layers of the model",
    "num_compressed": "layers whose pages are compressed",
    "bytes_per_token": "bytes of one token in the KV cache, all attention layers",
    "dense_bytes_per_token": "bytes of one token if all attention layers were dense in 16 bits",
    "bits_per_element": "stored bits of a key or value element, metadata included",
    "ratio": "requests of max_model_len tokens that fit, over those that fit dense; whole cache",
}


def figures(vllm_config: "VllmConfig") -> dict[str, float]:
    """The value of each gauge."""
    from vllm_metal.model.model_binding import ModelBinding

    model = vllm_config.model_config
    arguments = model_loader.load_arguments(model)
    structure = model_loader.load_structure(model.model, **arguments)
    binding = ModelBinding(structure)
    layers, states = binding.layers, binding.states
    cache = ModelPages.of(vllm_config, layers, states, neutral_constants(layers))
    known = {"ratio": cache.ratio(model.max_model_len)}
    return known | {name: getattr(cache.summary, name) for name in GAUGES.keys() - known.keys()}


class KVCacheMetrics(StatLoggerBase):
    """Gauges `vllm_metal:kv_cache_*`, set once."""

    _gauges: dict[str, Gauge] = {}

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0):
        self._vllm_config = vllm_config

    def log_engine_initialized(self) -> None:
        """Publishes the figures."""
        values = figures(self._vllm_config)
        for name, meaning in GAUGES.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(
                    f"vllm_metal:kv_cache_{name}",
                    meaning,
                    ["model_name"],
                    multiprocess_mode="mostrecent",
                )
            gauge = self._gauges[name].labels(self._vllm_config.model_config.served_model_name)
            gauge.set(values[name])

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0) -> None:
        """Nothing changes from step to step."""
