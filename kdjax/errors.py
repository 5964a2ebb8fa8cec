"""What other programs' errors say, in one line."""


def first_line(error: Exception) -> str:
    r"""The first line of an error's message, shortened; the name of its type if it has none.

    >>> first_line(ValueError('wrong\nfor many reasons')), first_line(KeyError())
    ('wrong', 'KeyError')
    """
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
