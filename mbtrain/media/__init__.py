"""Pictures and sound: from the bytes of a file to pixels or PCM, and back."""


class Undecodable(ValueError):
    """The bytes are no picture, or no sound, that can be decoded; the message is the reason, in plain words."""
