"""The Hub of Hugging Face, where it cannot be reached."""

from __future__ import annotations

import os


def ask_once(name: str | os.PathLike) -> None:
    """Turn huggingface_hub's offline mode on where a name is no path here, and the Hub does not answer.

    What the cache does not hold is then refused at once; it would be asked for six times, for 23 seconds a file.
    """
    if os.path.exists(name):
        return
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of an HTTP client, which is another one in each version
        constants.HF_HUB_OFFLINE = True
