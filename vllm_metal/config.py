"""The user's choices, parsed once at the door.

`additional_config` arrives as a dict, from `--additional-config JSON` or from
`LLM(additional_config=...)`. The platform parses it when vLLM checks its configuration and the
worker parses the same dict with the same function.
"""

from collections.abc import Mapping
from typing import Any

from vllm_metal.errors import UserError

KEYS: tuple[str, ...] = ()
"""Keys of `additional_config` that are known."""


def parse_additional_config(additional_config: Mapping[str, Any]) -> None:
    """Checks `additional_config`.

    Raises:
        UserError: it holds keys that are not known.
    """
    reasons = [
        f"unknown key {key!r} (allowed keys: {', '.join(KEYS) or 'none'})"
        for key in additional_config
        if key not in KEYS
    ]
    if reasons:
        raise UserError("additional_config is not valid", reasons)
