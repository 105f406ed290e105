"""Reads held-out documents by source, for reports. Training never reads labels."""

from collections.abc import Iterator, Sequence

from free_transformer.data.documents import read_documents_by_source, source_files
from free_transformer.data.tables import is_table, read_rows
from free_transformer.errors import InputError

LABEL_COLUMNS = ("source", "label")
MAX_LABELS = 12
MAX_CHARACTERS = 500_000  # per label; a sample is enough for a report


def read_labeled(sources: Sequence[str], column: str = "text") -> dict[str, list[str]]:
    """
    Reads documents by label.

    Labels come from a column `source` or `label` of the tables, otherwise from the first folder below a folder, or the
    names of several files.

    Args:
        sources: as for `read_documents`.
        column: name of the text column.

    Returns:
        2 to 12 labels with up to 500,000 characters of text each, or nothing if there are no such labels.
    """
    for name in LABEL_COLUMNS:
        if found := _by_label(_labeled_rows(sources, column, name)):
            return found
    return _by_label((each.source, each.text) for each in read_documents_by_source(sources, column))


def _labeled_rows(sources: Sequence[str], column: str, label: str) -> Iterator[tuple[str, str]]:
    for path in source_files(sources):
        if not is_table(path):
            continue
        try:
            labels = {number: str(value) for number, value in read_rows(path, label)}
        except (InputError, OSError):  # no such column
            continue
        yield from ((labels[number], text) for number, text in read_rows(path, column) if number in labels)


def _by_label(documents: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    characters: dict[str, int] = {}
    for label, text in documents:
        used = characters.setdefault(label, 0)
        if len(characters) > MAX_LABELS:
            return {}
        if used < MAX_CHARACTERS and text.strip():
            found.setdefault(label, []).append(text[: MAX_CHARACTERS - used])
            characters[label] = used + len(text)
    return found if len(found) > 1 else {}
