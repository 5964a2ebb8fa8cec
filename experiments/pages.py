"""A report as one page of HTML that needs nothing beside it."""

import base64
import html
import pathlib
import re

from markdown_it import MarkdownIt

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; background: #fff; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
table { font-size: 0.875rem; }
th, td { border: 1px solid #8886; padding: 0.3rem 0.5rem; text-align: left; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; background: #fff; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616; } }
"""
_IMAGE = re.compile('src="([^":]+)"')


def page(markdown: str, folder: pathlib.Path) -> str:
    """Markdown as HTML; images that lie in the folder stand in the page itself.

    >>> 'A &lt;b&gt;' in page('# A <b>', pathlib.Path())
    True
    """
    body = MarkdownIt('commonmark', {'html': False}).enable('table').render(markdown)
    title = next((line.removeprefix('# ') for line in markdown.splitlines() if line.startswith('# ')), 'Report')

    def inline(match: re.Match) -> str:
        file = folder / html.unescape(match[1])
        return f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"' if file.is_file() else match[0]

    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f'{_IMAGE.sub(inline, body)}</body>\n</html>\n'
    )
