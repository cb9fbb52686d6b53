"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user gave is wrong: a path, a field, a row, a layout.

    The message is a single line that names the place (file, line, field), what was expected and what was found. The
    command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What a library's exception says, without the stack that may follow."""
    return (str(error) or repr(error)).splitlines()[0]
