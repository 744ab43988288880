"""docs/errors.md is what the tests of bad input were told. (Theirs are named so that they run before.)"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
import errors_page  # noqa: E402


@pytest.mark.host_only
def test_errors_page_is_what_was_said(request):
    """docs/errors.md, word for word, in the pinned environment; ``make errors`` writes it."""
    options = request.config.option
    pinned = (errors_page.ROOT / "constraints.txt").read_text()
    if f"torch=={torch.__version__.partition('+')[0]}\n" not in pinned:
        pytest.skip("messages quote torch's reprs; the page is that of the pinned release")
    ran = {item.path.name for item in request.session.items}
    files = {file for files in errors_page.SECTIONS.values() for file in files}
    parts = options.keyword or options.markexpr or any("::" in arg for arg in request.config.args)
    if parts or not files <= ran:
        pytest.skip("not all tests ran")
    text = errors_page.render()
    if os.environ.get("COLDROW_WRITE_ERRORS"):
        errors_page.PAGE.write_text(text)
    assert errors_page.PAGE.read_text() == text, "docs/errors.md is stale: make errors"


def test_every_file_of_bad_input_is_on_the_page():
    files = {file for files in errors_page.SECTIONS.values() for file in files}
    assert files == {
        path.name for path in (errors_page.ROOT / errors_page.FOLDER).glob("test_bad_*.py")
    }
