"""Makes a notebook of a page.

    python classroom/notebook.py classroom/walkthrough.md classroom/walkthrough.ipynb

Its Python becomes cells, one for each thing that is shown after a #>. What is shown is left out:
predict it, then run the cell.
"""

import argparse
import json
import re
from pathlib import Path


def cells(page: str) -> list[tuple[str, str, str]]:
    """A page -> its cells: markdown or code, the source, and what is shown."""
    made = []
    parts = r"(.*?)(?:^```python\n(.*?)^```\n|\Z)"
    for text, block in re.findall(parts, page, flags=re.DOTALL | re.MULTILINE):
        made += [("markdown", text.strip(), "")]
        for code, shown in re.findall(r"((?:(?!#>).*\n)+)((?:#>.*\n)*)", block):
            made += [("code", code.strip(), re.sub("^#> ?", "", shown, flags=re.MULTILINE))]
    return [cell for cell in made if cell[1]]


def notebook(page: str) -> str:
    """A page -> the text of an .ipynb file."""
    of_code, made = {"execution_count": None, "outputs": []}, []
    for kind, source, _ in cells(page):
        cell = {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
        made.append(cell | (of_code if kind == "code" else {}))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    whole = {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes a notebook of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("to", type=Path, help="the .ipynb to make")
    args = parser.parse_args()
    try:
        text = notebook(args.page.read_text(encoding="utf-8"))
        args.to.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(str(error))
