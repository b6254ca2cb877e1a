"""The rendezvous of an agent of torchrun's that is alone: on loopback, with nothing to agree on.

Source: https://docs.pytorch.org/docs/stable/elastic/rendezvous.html
"""

from __future__ import annotations

from torch.distributed import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from lockstep.launchers.children import loopback_store

BACKEND = "lockstep-loopback"


class AloneOnLoopback(RendezvousHandler):
    """One node of one; the ranks use the same store as the agent."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id, self._store = parameters.run_id, loopback_store()

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        where = RendezvousStoreInfo("127.0.0.1", self._store.port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, where)

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True
