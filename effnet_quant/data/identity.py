"""Whether two sources hold the same images, as far as their names tell."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import ImageSource

_NAMES = 1000  # spread evenly over the source; a million names would take seconds


def identity(source: ImageSource) -> dict[str, Any]:
    """The number of images, and a digest of their labels and of up to 1,000 names, without the folders above.

    Shards are not read: the digest leaves their labels out.
    """
    digest = hashlib.sha256()
    if not isinstance(source, ShardSource):
        digest.update(source.labels.numpy().tobytes())
    count = len(source)
    for index in np.arange(min(count, _NAMES)) * count // min(count, _NAMES):
        digest.update("/".join(source.name(int(index)).split("/")[-2:]).encode("utf-8", "surrogateescape") + b"\0")
    return {"images": count, "digest": digest.hexdigest()}
