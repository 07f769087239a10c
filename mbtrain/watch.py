"""Ranks watch one another, so that none waits for ever for one that is gone, and the one that is gone is named.

Each rank sets a sign of life in the launcher's key-value store about every second, from a thread of its own over a
connection of its own, whatever its main thread does. Rank 0 looks at all signs and writes a verdict; the others look at
rank 0's sign and at the verdict. Whoever finds a verdict says it and ends the process with exit status 75: restarting
from the last checkpoint helps.

    a process that was killed     its peers' collectives fail at once; named after GRACE_S without a sign
    stopped, hung host, no link   named after lost_after_s without a sign
    an error on one rank alone    that rank's own words, GRACE_S after it left
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

EXIT_PEER_LOST = 75  # EX_TEMPFAIL of sysexits.h
BEAT_S = 1.0
GRACE_S = 6.0  # between the first sign that something is wrong and the verdict, so that the cause is found
VERDICT = "verdict"


@dataclass
class Peer:
    """What is known of a rank: its last sign of life, and when it came by this process's clock."""

    sign: dict[str, Any]
    seen_s: float


class Watch:
    """The watch of one rank. `store` has set, get and multi_get of bytes by key, as torch.distributed's stores do.

    last_words   called with the verdict before the process ends
    leave        ends the process; replaced in tests
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: int,
        lost_after_s: float,
        last_words: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
    ):
        self.store, self.rank, self.ranks, self.lost_after_s = store, rank, ranks, lost_after_s
        self.last_words, self.leave = last_words, leave
        self.sign: dict[str, Any] = {"beat": 0, "host": socket.gethostname(), "pid": os.getpid(), "left": None}
        self.peers: dict[int, Peer] = {}
        self.trouble_s: float | None = None
        self.answered_s = time.monotonic()
        self.over = threading.Event()
        self.ended = threading.Lock()
        self.store.set(self._key(rank), json.dumps(self.sign))

    def start(self) -> None:
        """Begin; every rank has made its Watch (a barrier lies between)."""
        for work in (self._beat, self._judge_store):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def stop(self) -> None:
        """The run is over, on all ranks alike: silence means nothing any more."""
        self.over.set()

    def wait_for_verdict(self, error: BaseException) -> None:
        """Called by a rank that must leave alone: tell the others why, and end when it is known who was the cause."""
        self.sign["left"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.sign["secondary"] = is_secondary(error)
        deadline = time.monotonic() + self.lost_after_s + 2 * GRACE_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S)
        self._end(f"rank {self.rank} on {self.sign['host']}: {self.sign['left']}")

    def _beat(self) -> None:
        while not self.over.wait(BEAT_S):
            self.sign["beat"] += 1
            try:
                self.store.set(self._key(self.rank), json.dumps(self.sign))
                verdict = self._look_at_all() if self.rank == 0 else self._look_at_rank_0()
            except Exception as error:  # whatever the store's connection raises
                if self.rank == 0:
                    verdict = f"the ranks' key-value store fails: {error}"
                else:
                    verdict = f"{self._name(0)} is gone: its key-value store does not answer"
            if verdict:
                self._end(verdict)
                return
            self.answered_s = time.monotonic()

    def _judge_store(self) -> None:
        """A call to a host that is cut off may never return: then this second thread ends the process."""
        while not self.over.wait(BEAT_S):
            if time.monotonic() - self.answered_s > self.lost_after_s:
                self._end(
                    f"{self._name(0)} does not answer for {self.lost_after_s:.0f} s: its host or the link is gone"
                )
                return

    def _look_at_rank_0(self) -> str | None:
        told = self.store.multi_get([self._key(0), VERDICT])
        self._note(0, told[0])
        if verdict := told[1].decode():
            return verdict
        silent_s = time.monotonic() - self.peers[0].seen_s
        return f"{self._name(0)} gives no sign of life for {silent_s:.0f} s" if silent_s > self.lost_after_s else None

    def _look_at_all(self) -> str | None:
        before_s = self.answered_s
        told = self.store.multi_get([self._key(rank) for rank in range(self.ranks)])
        now_s = time.monotonic()
        if now_s - before_s > 5 * BEAT_S:  # it was this process that stood still: the others' silence is not known
            for peer in self.peers.values():
                peer.seen_s = now_s
        for rank, content in enumerate(told):
            self._note(rank, content)
        verdict = self._verdict(now_s)
        if verdict:
            self.store.set(VERDICT, verdict)
            time.sleep(2.5 * BEAT_S)  # the store ends with this process: let the others read
        return verdict

    def _verdict(self, now_s: float) -> str | None:
        """Who is to blame, if anybody is; first those without a sign of life, then those with an error of their own."""
        left = [rank for rank, peer in self.peers.items() if peer.sign["left"]]
        if left and self.trouble_s is None:
            self.trouble_s = now_s
        hurried = self.trouble_s is not None
        patience_s = min(GRACE_S, self.lost_after_s) if hurried else self.lost_after_s
        silent = [rank for rank, peer in self.peers.items() if rank and now_s - peer.seen_s > patience_s - BEAT_S]
        silent = [rank for rank in silent if rank not in left]
        if silent:
            said_s = now_s - min(self.peers[rank].seen_s for rank in silent)
            names = ", ".join(self._name(rank) for rank in silent[:4]) + (" and more" if len(silent) > 4 else "")
            return f"{names}: no sign of life for {said_s:.0f} s; killed, stopped, or the host or link is gone"
        if self.trouble_s is None or now_s - self.trouble_s < GRACE_S:
            return None
        if own := [rank for rank in left if not self.peers[rank].sign["secondary"]]:
            return f"{self._name(own[0])}: {self.peers[own[0]].sign['left']}"
        if missing := [rank for rank in self.peers if rank not in left]:
            return f"{self._name(missing[0])}: alive, but did not come where the others waited for it"
        return f"{self._name(left[0])}: {self.peers[left[0]].sign['left']}"

    def _note(self, rank: int, content: bytes) -> None:
        sign = json.loads(content)
        if rank not in self.peers or self.peers[rank].sign != sign:
            self.peers[rank] = Peer(sign, time.monotonic())

    def _end(self, verdict: str) -> None:
        if self.over.is_set() or not self.ended.acquire(blocking=False):
            return
        try:
            self.last_words(verdict)
        finally:
            self.leave(EXIT_PEER_LOST)

    def _name(self, rank: int) -> str:
        if rank not in self.peers:
            return f"rank {rank}"
        sign = self.peers[rank].sign
        return f"rank {rank} on {sign['host']} (pid {sign['pid']})"

    @staticmethod
    def _key(rank: int) -> str:
        return f"watch/{rank}"


def begin(rank: int, ranks: int, lost_after_s: float, last_words: Callable[[str], None]) -> Watch | None:
    """Start watching, on all ranks of the process group together; None for a single rank."""
    if ranks == 1:
        return None
    import torch.distributed as dist

    launchers: Any = dist.distributed_c10d._get_default_store()
    store = launchers.clone()
    store.set_timeout(timedelta(seconds=lost_after_s))
    if rank == 0:
        store.set(VERDICT, "")
    watch = Watch(store, rank, ranks, lost_after_s, last_words)
    dist.barrier()
    watch.start()
    return watch


def is_secondary(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    from torch.distributed import DistError

    text = str(error)
    marks = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe", "recvBytes", "sendBytes")
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(mark in text for mark in marks))
