"""The one error type that a person is meant to read."""


class UserError(ValueError):
    """Bad input (config, file, request), in one line that names the field, its value and the numbers in conflict.

    The CLI prints the line and leaves with exit code 2.
    """
