"""Ranks that watch one another: who is gone is named, and nobody waits for ever.

The ranks are threads over one store here; tests/test_faults.py kills and stops real ones. pytest tests/test_watch.py
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from mbtrain import watch
from mbtrain.watch import EXIT_PEER_LOST, Watch


class Store:
    """What the watch needs of torch's stores. `hung` answers no more, `closed` raises."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {watch.VERDICT: b""}
        self.hung = threading.Event()
        self.closed = False

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.held[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        return [self.held[key] for key in keys]

    def _answer(self) -> None:
        if self.closed:
            raise ConnectionError("closed")
        while self.hung.is_set():
            time.sleep(0.01)


class Rank:
    """A watch whose process does not end, but notes that it would have; `stop` freezes or kills it."""

    def __init__(self, store: Store, rank: int, ranks: int, lost_after_s: float):
        self.said: list[str] = []
        self.left: list[int] = []
        self.watch = Watch(store, rank, ranks, lost_after_s, self.said.append, self._leave)

    def _leave(self, code: int) -> None:
        self.left.append(code)
        self.watch.over.set()

    def stop(self) -> None:
        self.watch.over.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_S", 0.05)
    monkeypatch.setattr(watch, "GRACE_S", 0.4)


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.hung.clear()


def begin(store: Store, ranks: int, lost_after_s: float) -> list[Rank]:
    made = [Rank(store, i, ranks, lost_after_s) for i in range(ranks)]
    for rank in made:
        rank.watch.start()
    return made


def wait_until_left(ranks: list[Rank], timeout_s: float = 5.0) -> float:
    began = time.monotonic()
    while not all(rank.left for rank in ranks):
        assert time.monotonic() - began < timeout_s, [rank.said for rank in ranks]
        time.sleep(0.01)
    assert all(rank.left == [EXIT_PEER_LOST] for rank in ranks)
    return time.monotonic() - began


def test_nobody_leaves_while_all_live_or_after_the_run_is_over(store: Store) -> None:
    ranks = begin(store, 3, lost_after_s=0.3)
    time.sleep(1.0)
    for rank in ranks:
        rank.watch.stop()
    time.sleep(0.6)
    assert not any(rank.left or rank.said for rank in ranks)


@pytest.mark.parametrize("gone", [1, 2])
def test_a_silent_rank_is_named_by_all(store: Store, gone: int) -> None:
    """As when its process was stopped: none of the others has failed yet."""
    ranks = begin(store, 4, lost_after_s=0.6)
    ranks[gone].stop()
    rest = [rank for i, rank in enumerate(ranks) if i != gone]
    assert wait_until_left(rest) > 0.4
    for rank in rest:
        assert rank.said[0].startswith(f"rank {gone} on ")
        assert "no sign of life" in rank.said[0]


def test_a_killed_rank_is_named_soon_though_its_peers_failed_first(store: Store) -> None:
    """Long before lost_after_s, and not the ranks whose collectives broke because of it."""
    ranks = begin(store, 3, lost_after_s=60.0)
    ranks[2].stop()
    error = RuntimeError("[gloo/transport/tcp/pair.cc:550] Connection closed by peer [127.0.0.1]:4242")
    for rank in ranks[:2]:
        threading.Thread(target=rank.watch.wait_for_verdict, args=(error,), daemon=True).start()
    assert wait_until_left(ranks[:2]) < 3
    assert all(rank.said[0].startswith("rank 2 on ") for rank in ranks[:2])


@pytest.mark.parametrize("failing", [0, 1])
def test_the_rank_whose_own_error_it_is_is_quoted(store: Store, failing: int) -> None:
    ranks = begin(store, 3, lost_after_s=60.0)
    for i, rank in enumerate(ranks):
        error = MemoryError("of its own") if i == failing else RuntimeError("gloo: Connection closed by peer")
        threading.Thread(target=rank.watch.wait_for_verdict, args=(error,), daemon=True).start()
    wait_until_left(ranks)
    for rank in ranks:
        assert rank.said[0].startswith(f"rank {failing} on ")
        assert "MemoryError: of its own" in rank.said[0]


def test_a_rank_that_lives_but_does_not_come_is_named(store: Store) -> None:
    ranks = begin(store, 3, lost_after_s=60.0)
    error = RuntimeError("[gloo] Timed out waiting 600000ms for recv operation to complete")
    for rank in ranks[:2]:
        threading.Thread(target=rank.watch.wait_for_verdict, args=(error,), daemon=True).start()
    wait_until_left(ranks[:2])
    assert "rank 2 on" in ranks[0].said[0]
    assert "did not come" in ranks[0].said[0]


def test_rank_0_gone_with_its_store(store: Store) -> None:
    ranks = begin(store, 3, lost_after_s=60.0)
    time.sleep(0.2)
    ranks[0].stop()
    store.closed = True
    assert wait_until_left(ranks[1:]) < 2
    assert all(rank.said[0].startswith("rank 0 on ") for rank in ranks[1:])


def test_a_store_that_answers_no_more_is_given_up_by_the_second_thread(store: Store) -> None:
    """The link is cut: a call to the store does not come back at all."""
    ranks = begin(store, 3, lost_after_s=0.5)
    time.sleep(0.2)
    store.hung.set()
    assert wait_until_left(ranks[1:]) > 0.3
    assert all("rank 0 on" in rank.said[0] for rank in ranks[1:])


def test_rank_0_does_not_judge_the_others_by_its_own_sleep(store: Store) -> None:
    """It was rank 0 that stood still: what it did not see in that time says nothing."""
    rank = Rank(store, 0, 2, lost_after_s=60.0)
    store.set("watch/1", json.dumps({"beat": 1, "host": "b", "pid": 1, "left": None}))
    assert rank.watch._look_at_all() is None
    rank.watch.lost_after_s = 0.1
    rank.watch.answered_s -= 10
    rank.watch.peers[1].seen_s -= 10
    assert rank.watch._look_at_all() is None
    rank.watch.peers[1].seen_s -= 10
    rank.watch.answered_s = time.monotonic()
    assert "rank 1 on b" in (rank.watch._look_at_all() or "")


def test_what_is_only_an_echo_of_anothers_death() -> None:
    assert watch.is_secondary(RuntimeError("[enforce fail at gloo/transport] Connection closed by peer [::1]:1"))
    assert watch.is_secondary(RuntimeError("NCCL communicator was aborted"))
    assert not watch.is_secondary(RuntimeError("CUDA out of memory"))
    assert not watch.is_secondary(ValueError("gloo"))
