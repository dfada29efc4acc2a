"""The model and data hub: is it there?"""

from __future__ import annotations

from huggingface_hub import constants, get_session

_PROBE_SECONDS = 10.0


def hub_answers() -> bool:
    """Whether the hub can be asked: one short question, where the client would try six times with growing pauses."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # no network, no name, refused by a proxy, too slow: all mean "use the cache"
        return False
    return True
