"""The README and the documents, their blocks of code, and the rows of their tables."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")])


def blocks(text, language=""):
    """The blocks of code in a language; by default those that name none."""
    return [code for found, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if found == language]


def without_blocks(text):
    """A text without its blocks of code."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)


def rows(text):
    """The cells of each row of each table, headings included."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
