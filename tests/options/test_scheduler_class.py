"""Which scheduler vLLM is given, and what it says of it."""

import inspect
import logging
import re

import pytest
from vllm.config import SchedulerConfig

from vllm_metal import scheduler
from vllm_metal.options.scheduler_class import ends_requests, hide_warning_about_own_scheduler


@pytest.mark.parametrize(
    ("asynchronous", "expected"),
    [(True, scheduler.AsyncMetalScheduler), (False, scheduler.MetalScheduler)],
)
def test_the_scheduler_follows_async_scheduling(make_config, asynchronous, expected):
    config = make_config(async_scheduling=asynchronous)
    assert config.scheduler_config.get_scheduler_cls() is expected


def test_a_scheduler_of_the_users_is_left_alone(make_config):
    name = "vllm.v1.core.sched.scheduler.Scheduler"
    config = make_config(scheduler_cls=name, async_scheduling=False)
    assert config.scheduler_config.scheduler_cls == name and not ends_requests(config)


@pytest.mark.parametrize(
    ("name", "warns"),
    [("vllm_metal.scheduler.AsyncMetalScheduler", False), ("users.scheduler.Scheduler", True)],
)
def test_vllm_warns_of_custom_schedulers_but_not_of_this_one(name, warns):
    """Its logger is asked as `Logger.handle` asks it."""
    hide_warning_about_own_scheduler()
    source = inspect.getsource(SchedulerConfig.get_scheduler_cls)
    [text] = re.findall(r'"(Using custom scheduler class %s)', source)
    record = logging.LogRecord("", logging.WARNING, "", 0, text, (name,), None)
    assert bool(logging.getLogger(SchedulerConfig.__module__).filter(record)) is warns
