"""The composition of the KV cache, at `/metrics`.

vLLM loads `KVCacheMetrics` in the API server, through the entry point group
`vllm.stat_logger_plugins`. The figures are those of the report at start: they are computed by the
same functions, from the model's config file and the layouts of its pages.
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
    "dense_bytes_per_token": "bytes of one token if all attention layers had dense 16-bit pages",
    "bits_per_element": "stored bits of a key or value element, metadata included",
    "ratio": "requests of max_model_len tokens that fit, relative to dense 16-bit pages",
}


def figures(vllm_config: "VllmConfig") -> dict[str, float]:
    """The value of each gauge."""
    from vllm_metal.model.model_binding import ModelBinding

    model = vllm_config.model_config
    structure = model_loader.load_structure(model_loader.ModelSource.of(model))
    binding = ModelBinding(structure)
    layers, states = binding.layers, binding.states
    cache = ModelPages.of(vllm_config, layers, states, neutral_constants(layers))
    known = {"ratio": cache.ratio(model.max_model_len)}
    return known | {name: getattr(cache.summary, name) for name in GAUGES.keys() - known.keys()}


class KVCacheMetrics(StatLoggerBase):
    """The gauges `vllm_metal:kv_cache_*`, which are set once, when the engine is ready."""

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
        """Does nothing: no figure changes from step to step."""
