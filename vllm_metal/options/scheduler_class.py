"""`--scheduler-cls`: this package's scheduler where the user names none."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MODULE = "vllm_metal.scheduler."


def ends_requests(vllm_config: "VllmConfig") -> bool:
    """Whether the scheduler ends requests whose logits are not finite, or is to be set to one."""
    return str(vllm_config.scheduler_config.scheduler_cls or _MODULE).startswith(_MODULE)


def set_scheduler_class(vllm_config: "VllmConfig") -> None:
    """Sets vLLM's scheduler with the end of requests whose logits are not finite.

    A scheduler of the user's own stays.
    """
    if ends_requests(vllm_config):
        scheduler = vllm_config.scheduler_config
        name = "AsyncMetalScheduler" if scheduler.async_scheduling else "MetalScheduler"
        scheduler.scheduler_cls = _MODULE + name


def hide_warning_about_own_scheduler() -> None:
    """Leaves out vLLM's warning about custom schedulers where it names this package's.

    To be called in every process: vLLM warns in that of the engine.
    """
    vllm_logger = logging.getLogger("vllm.config.scheduler")
    if _not_about_own_scheduler not in vllm_logger.filters:
        vllm_logger.addFilter(_not_about_own_scheduler)


def _not_about_own_scheduler(record: logging.LogRecord) -> bool:
    about_custom = str(record.msg).startswith("Using custom scheduler class")
    return not (about_custom and _MODULE in str(record.args))
