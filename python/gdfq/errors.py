"""The error whose message is meant for the person at the keyboard."""


class GdfqError(Exception):
    """Something the user gave, or the machine lacks, stops the work.

    The message names what was given, what is allowed and what to do; the command line prints the message alone and
    exits with code 2. Anything else that escapes is a defect of ours and keeps its traceback.

    Attributes:
        is_said: whether another process says it (see `gdfq.ranks`).
    """

    is_said = False
