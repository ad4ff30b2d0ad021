"""What the documents say is so: README code, README tables, examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*readme.TABLES, "docs/tasks.md"]


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def places(text: str) -> set[str]:
    """What the headings of a document are called in links."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_python_block_runs(document: str) -> None:
    found = blocks((ROOT / document).read_text())
    assert found
    for code in found:
        exec(compile(code, document, "exec"), {})


@pytest.mark.parametrize("document", readme.TABLES)
def test_documents_quote_the_recorded_results_and_nothing_else(document: str) -> None:
    assert readme.render(document) == (ROOT / document).read_text()


def test_every_result_says_how_it_was_made() -> None:
    results = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        result = json.loads(path.read_text())
        assert {"command", "commit", "date", "hardware", "torch", "seed"} <= result.keys(), path
        assert "/" not in result["commit"]
        assert str(Path.home()) not in path.read_text()


def test_links_inside_the_repository_lead_somewhere() -> None:
    for document in (ROOT / name for name in [*DOCUMENTS, "pretrained/README.md"]):
        for target, place in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", document.read_text()):
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name}: {target}"
            assert not place or place in places(path.read_text()), f"{document.name}: #{place}"
