"""Docstrings as reStructuredText: they are written to be read in a terminal, and Sphinx takes formulas for markup."""

import re

# Code, and a word in emphasis, are markup; elsewhere, in formulas, the signs mean what they are: |w|, x * y, mean_, a \ b.
MARKED = re.compile(r'(``.+?``|`[^`]+`|(?<!\S)\*\w+\*(?=\W|$))')
CODE = re.compile(r'`[^`]+`')
NAME = re.compile(r'`[A-Za-z][\w.]*`')
SIGNS = re.compile(r'[*|\\]|_(?=\W|$)')


def as_restructured_text(docstring: str) -> str:
    r"""A docstring whose markup is backticks, lists, tables, doctests, and code that is indented by four columns.

    >>> print(as_restructured_text('The sum of |w|:\n- of `array`s, and\n- of w*.\n\n    code(*here)'))
    The sum of \|w\|:
    <BLANKLINE>
    - of `array`\ s, and
    - of w\*.
    <BLANKLINE>
    ::
    <BLANKLINE>
        code(*here)
    """
    written: list[str] = []
    table: list[str] = []
    code: int | None = None  # the indentation of the code that a line is part of
    doctest = in_list = False
    before = 0  # the indentation of the last paragraph or item
    for line in [*docstring.expandtabs().splitlines(), '']:
        text = line.lstrip()
        indentation = len(line) - len(text)
        if table and not text.startswith('|'):
            written += list_table(table)
            table = []
        if code is not None and text and indentation < code:
            code = None
        if not text:
            doctest = in_list = False
            written.append('')
        elif code is not None or doctest:
            written.append(line)
        elif text.startswith(('| ', '|--')):
            table.append(line)
        elif text.startswith('>>>'):
            doctest = True
            written += ['', line]
        elif indentation >= before + 4 and not (written and written[-1]):
            code = indentation
            written += [' ' * before + '::', '', line]
        else:
            item = text.startswith('- ')
            if item != in_list and (item or indentation <= before):
                written.append('')
                in_list = item
            if item or not in_list:
                before = indentation
            written.append(prose(line))
    return '\n'.join(written[:-1])


def prose(line: str) -> str:
    """A line whose signs stand for themselves, and whose code is a link where it may be a name, and code where it is not."""
    parts = MARKED.split(line)
    parts[1::2] = [f'`{part}`' if CODE.fullmatch(part) and not NAME.fullmatch(part) else part for part in parts[1::2]]
    parts[::2] = [SIGNS.sub(r'\\\g<0>', part) for part in parts[::2]]
    parts[2::2] = [rf'\ {part}' if part[:1].isalnum() else part for part in parts[2::2]]
    return ''.join(parts)


def list_table(lines: list[str]) -> list[str]:
    """A table of Markdown as a directive."""
    margin = ' ' * (len(lines[0]) - len(lines[0].lstrip()))
    rows = [[cell.strip() for cell in line.strip(' |').split('|')] for line in lines]
    written = ['', f'{margin}.. list-table::', f'{margin}   :header-rows: 1', '']
    for row in [rows[0], *rows[2:]]:
        written += [f'{margin}   {"  -" if i else "* -"} {prose(cell)}' for i, cell in enumerate(row)]
    return [*written, '']
