"""Write the five texts of ``eval/study_calibration.py``, one JSON list of documents each.

    python eval/study_calibration_texts.py CORPORA OUT

CORPORA holds ``wikitext-2/valid.txt`` (WikiText-2's validation text), ``tinystories/*.json`` (a list of TinyStories) and
``books/*.txt`` (books of Project Gutenberg, without their headers). The other two come with Python: the topics of its
documentation, and modules of its standard library. Each text has at most as many characters as a hundred thousand tokens take.
"""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path

import click

from confsteer.text.sources import python_docs

CHARACTERS = 600_000
"""Of each text: more than a hundred thousand tokens of any tokenizer."""
MODULE_CHARACTERS = 16_000
"""Of a module at most: long ones would make a text of few documents."""


def articles(file: Path) -> list[str]:
    """Cut WikiText at the titles of its articles, of which sections have more signs."""
    return [part.strip() for part in re.split(r"^ = (?!= )(?=.* = $)", file.read_text(encoding="utf-8"), flags=re.M)[1:]]


def book_stretches(folder: Path) -> list[str]:
    """Take a stretch out of the middle of each book, as long as each other's."""
    books = [file.read_text(encoding="utf-8-sig") for file in sorted(folder.glob("*.txt"))]
    length = CHARACTERS // len(books)
    return [book[len(book) // 2 :][:length] for book in books]


def modules() -> list[str]:
    """Read the modules of the standard library that are not long."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [file.read_text(encoding="utf-8") for file in files]
    return [source for source in sources if 500 < len(source) <= MODULE_CHARACTERS]


def within(documents: list[str]) -> list[str]:
    """Leave out what goes beyond `CHARACTERS`."""
    kept, total = [], 0
    for document in documents:
        total += len(document)
        if total > CHARACTERS:
            break
        kept.append(document)
    return kept


@click.command()
@click.argument("corpora", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def main(corpora: Path, out: Path) -> None:
    """Write five texts to the folder OUT."""
    (stories,) = (corpora / "tinystories").glob("*.json")
    texts = {
        "documentation": [*python_docs("calibration"), *python_docs("held-out")],
        "wikitext-2": articles(corpora / "wikitext-2" / "valid.txt"),
        "tinystories": json.loads(stories.read_text(encoding="utf-8")),
        "books": book_stretches(corpora / "books"),
        "code": modules(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in texts.items():
        kept = within(documents)
        (out / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
        click.echo(f"{name}: {len(kept)} of {len(documents)} documents, {sum(map(len, kept)):,} characters")


if __name__ == "__main__":
    main()
