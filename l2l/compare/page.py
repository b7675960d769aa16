"""``index.html``: the whole comparison on one page that opens offline: figures are in it, and nothing is fetched."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from l2l.compare.sheets import Sheet

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr:hover td { background: #f4f6fa; }
td.best { font-weight: bold; }
.note { color: #555; max-width: 60rem; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in said %}<p class="note">{{ line }}</p>
{% endfor %}
{% for sheet in sheets %}<h2>{{ sheet.title }}</h2>
<div class="wide"><table>
<tr>{% for name in sheet.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr>{% for cell in row %}<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}</td>\
{% endfor %}</tr>
{% endfor %}</table></div>
{% if sheet.note %}<p class="note">{{ sheet.note }}</p>{% endif %}
{% endfor %}
{% for name, data in pictures.items() %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
{% for name, text in listings.items() %}<h2>{{ name }}</h2>
<pre>{{ text }}</pre>
{% endfor %}
</body>
</html>
"""


def page(
    title: str,
    said: Sequence[str],
    sheets: Sequence[Sheet],
    pictures: Mapping[str, Path],
    listings: Mapping[str, str],
) -> str:
    """The page; every text in it is escaped.

    Args:
        said: paragraphs between title and tables.
        pictures: what a PNG file shows -> where it lies.
        listings: heading -> text that is shown as it stands.
    """
    from jinja2 import Environment

    inside = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    template = Environment(autoescape=True, trim_blocks=False).from_string(TEMPLATE)
    return template.render(title=title, said=said, sheets=sheets, pictures=inside, listings=listings)
