"""What a sequence remembers, as pytrees with static shapes: V2 and V3 here; V4 in `dsjax.cache.v4`."""

from dsjax.cache.v3 import (
    KEY_BLOCK,
    SPARE,
    STATE_VERSION,
    Cache,
    Latent,
    SequenceState,
    extract,
    init_cache,
    insert,
    key_block,
    read_block,
    rollback,
    write,
)

__all__ = [
    "KEY_BLOCK",
    "SPARE",
    "STATE_VERSION",
    "Cache",
    "Latent",
    "SequenceState",
    "extract",
    "init_cache",
    "insert",
    "key_block",
    "read_block",
    "rollback",
    "write",
]
