"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

from huggingface_hub import constants, get_session

_PROBE_SECONDS = 10.0


def hub_answers() -> bool:
    """Whether the hub answers one short request; its client would retry for about a minute before it gives up."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # no network, no DNS, a proxy that refuses, too slow: in every case the cache is used
        return False
    return True
