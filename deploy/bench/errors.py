"""What keeps a row from being measured."""


class BenchError(Exception):
    """The message says what is missing and what to do."""
