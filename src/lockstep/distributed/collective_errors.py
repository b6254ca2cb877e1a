"""What an exception that a collective raises says of the other ranks."""

from __future__ import annotations

PEER_LOST = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Broken pipe",
    "NCCL error",
    "NCCL Async Error",
    "NCCL communicator was aborted",
    "ncclRemoteError",
    "connectFullMesh failed",
    "Connection was likely closed",
)
TIMED_OUT = (
    "Timed out waiting",
    "wait timeout after",
    "Socket Timeout",
    "Application timeout caused pair closure",
    "NCCL operation timed out",
    "collective operation timeout",
)
# NCCL says so of what this rank itself asked for, such as a GPU that another rank has.
OWN_MISTAKE = ("ncclInvalidUsage", "ncclInvalidArgument", "invalid usage", "invalid argument")


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception only says that another rank is gone."""
    return has_sign(error, PEER_LOST) and not has_sign(error, (*OWN_MISTAKE, *TIMED_OUT))


def timed_out(error: BaseException) -> bool:
    """Whether an exception only says that another rank has not come."""
    return has_sign(error, TIMED_OUT)


def has_sign(error: BaseException, signs: tuple[str, ...]) -> bool:
    """Whether torch raised it with one of these texts; a checkpoint's errors contain those of its collectives."""
    from_torch = isinstance(error, RuntimeError) or type(error).__module__.startswith("torch.")
    return from_torch and any(sign in str(error) for sign in signs)
