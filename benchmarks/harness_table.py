"""The table of lm-evaluation-harness' fields, as docs/harness.md shows it: printed, or put into the page between its marks.

python benchmarks/harness_table.py [--page docs/harness.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from l2l.tasks.harness import FIELDS

BEGIN, END = "<!-- python benchmarks/harness_table.py --page docs/harness.md -->", "<!-- end of the table -->"


def table() -> str:
    """A line per field, in the order of the code."""
    lines = ["| field | here | how, or why not |", "|---|---|---|"]
    for name, field in FIELDS.items():
        lines.append(f"| `{name}` | {field.status} | {field.what.replace('|', '&#124;')} |")
    return "\n".join(lines)


def page_with_table(text: str) -> str:
    """The page with the table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    if options.page is None:
        print(table())
    else:
        options.page.write_text(page_with_table(options.page.read_text()))


if __name__ == "__main__":
    main()
