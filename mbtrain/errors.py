"""What mbtrain raises for a user to read. Every message says what, where, got, expected, and what to do.

MbtrainError             base: one line on stderr and exit status 2, never a traceback
 ├─ ConfigError          a wrong key, type, value or combination of settings
 ├─ DataError            sources, shards or manifests that are missing, cut off or changed
 ├─ CheckpointError      a run or checkpoint that is missing, cut off or does not fit
 └─ NonFiniteError       a loss or gradient that is not a number: training stopped before the update
"""


class MbtrainError(Exception):
    """Base of all errors that a user can mend. The message is one line."""


class ConfigError(MbtrainError):
    """A wrong key, type, value or combination of settings; the message starts with the dotted path."""


class DataError(MbtrainError):
    """Sources, shards or manifests that are missing, cut off or changed; the message names file and key."""


class CheckpointError(MbtrainError):
    """A run or checkpoint that is missing, cut off or does not fit; the message names the file."""


class NonFiniteError(MbtrainError):
    """A loss or gradient that is not finite, found on all ranks before the update; names step and cause."""
