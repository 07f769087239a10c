"""What mbtrain raises for a user to read. Every message says what, where, got, expected, and what to do.

MbtrainError             base: one line on stderr and exit status 2, never a traceback
 ├─ ConfigError          a wrong key, type, value or combination of settings
 ├─ DataError            sources, shards or manifests that are missing, cut off or changed
 ├─ CheckpointError      a run or checkpoint that is missing, cut off or does not fit
 ├─ DivergedError        a loss or gradient that is not finite, or a loss that spikes: stopped before the update
 └─ PeersError           ranks that did not meet: exit status 75, starting again may help
"""


class MbtrainError(Exception):
    """Base of all errors that a user can mend. The message is one line."""


class ConfigError(MbtrainError):
    """A wrong key, type, value or combination of settings; the message starts with the dotted path."""


class DataError(MbtrainError):
    """Sources, shards or manifests that are missing, cut off or changed; the message names file and key."""


class CheckpointError(MbtrainError):
    """A run or checkpoint that is missing, cut off or does not fit; the message names the file."""


class DivergedError(MbtrainError):
    """A loss or gradient that is not finite, or a loss that spikes, on all ranks before the update; names the step."""


class PeersError(MbtrainError):
    """Ranks that did not meet at the start; names this rank and where it waited."""
