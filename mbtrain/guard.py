"""Which steps are bad, by their loss: pure functions of the losses before, the same on all ranks and after a resume."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mbtrain.config import GuardConfig


def spike(guard: GuardConfig, recent: Sequence[float], loss: float) -> str | None:
    """What is said of a loss that lies too far above the recent ones; None when it does not, or nothing is looked for.

    recent: the last good losses, oldest first, at most guard.window of them. All in nats a target. A loss of nan is
    that of a step without targets: nothing is said of it, and it is not remembered.
    """
    if guard.spike is None or len(recent) < guard.window // 2:
        return None
    mean = math.fsum(recent) / len(recent)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in recent) / len(recent))
    if not loss > mean + guard.spike * deviation:
        return None
    return (
        f"the loss of {loss:.4f} nats spikes: more than {guard.spike:g} deviations of {deviation:.4f} above the mean "
        f"of the last {len(recent)}, {mean:.4f}"
    )


def remembered(guard: GuardConfig, recent: Sequence[float], loss: float) -> list[float]:
    """The recent losses after a good step; nothing is kept where spikes are not looked for."""
    if guard.spike is None:
        return []
    return (list(recent) if math.isnan(loss) else [*recent, loss])[-guard.window :]


def with_bad(guard: GuardConfig, bad_steps: Sequence[int], step: int) -> list[int]:
    """The bad steps of the last window, with this one."""
    return [*(bad for bad in bad_steps if bad > step - guard.window), step]
