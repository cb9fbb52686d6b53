"""The exceptions a user is meant to read."""


class UserError(Exception):
    """Something the user gave is wrong: a path, a field, a row, a layout.

    The message is a single line that names the place (file, line, field), what was expected and what was found. The
    command line prints it without a traceback and exits with code 2.
    """


class NotPromised(Exception):
    """A limit that the user requires cannot be promised: the run's result, found after everything was written.

    The message is a single line with the bound, the limit and how many prompts would be needed. The command line prints
    it without a traceback and exits with code 1.
    """


class Waiting(Exception):
    """Nothing is wrong: the job goes on when people have done what the message, a single line, says.

    The command line prints it without a traceback and exits with code 3.
    """


def first_line(error: BaseException) -> str:
    """What a library's exception says, without the stack that may follow."""
    return (str(error) or repr(error)).splitlines()[0]
