"""What the docs show is what is compiled and run.

A fenced block below a comment that names a file, such as ``<!-- examples/lion.hpp -->`` or
``<!-- examples/00_one_row.cpp: update -->``, is that file, or its lines between ``// [update]`` and
``// [/update]``. ``python tests/python/project/test_docs.py --write`` refreshes the blocks.

A document with ``sh`` blocks is followed from top to bottom, as a reader would: files shown whole are
saved, ``sh`` and ``python`` blocks are run, ``text`` below them is what they printed. Below
``<!-- says tests/compile_fail/name.cpp -->`` it is what g++ says to that file.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A fenced block: file and region named above it, if any; language; text.
BLOCK = re.compile(
    r"^(?:<!-- (?P<says>says )?(?P<file>[\w./-]+)(?:: (?P<region>\w+))? -->\n)?"
    r"```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def named(block: re.Match) -> str:
    """The text of the file or region that a block names."""
    lines = (ROOT / block["file"]).read_text().splitlines(keepends=True)
    marks = [re.fullmatch(r"\s*(?://|#) \[(/?\w+)\]\n", line) for line in lines]
    if block["region"] is None:
        return "".join(line for line, mark in zip(lines, marks, strict=True) if not mark)
    names = [mark and mark[1] for mark in marks]
    begin, end = names.index(block["region"]), names.index("/" + block["region"])
    return textwrap.dedent("".join(lines[begin + 1 : end]))


def refreshed(document: str) -> str:
    def refresh(block: re.Match) -> str:
        if block["file"] is None or block["says"]:
            return block[0]
        return block[0][: block.start("text") - block.start()] + named(block) + "```"

    return BLOCK.sub(refresh, document)


def of_docs(docs: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", docs, ids=lambda path: path.name)


@of_docs(DOCS)
def test_code_is_that_of_the_files_named(path):
    text = path.read_text()
    assert text == refreshed(text), "run: python tests/python/project/test_docs.py --write"
    for block in BLOCK.finditer(text):
        assert block["file"] or block["language"] in ("sh", "python", "text", "diff"), block[0]


@of_docs(DOCS)
def test_files_linked_to_exist(path):
    for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def said(expected: str, output: str) -> bool:
    """Whether lines with what is expected were printed, in order; "..." stands for any lines."""
    lines = iter(output.splitlines())
    return all(
        any(part.strip() in line for line in lines)
        for part in expected.splitlines()
        if part != "..."
    )


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="g++ or cmake")
@of_docs([path for path in DOCS if "```sh\n" in path.read_text()])
def test_documents_can_be_followed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("COLDROW_JIT_CACHE", str(tmp_path / "jit"))
    names, output = {}, ""
    for block in BLOCK.finditer(path.read_text()):
        if block["says"]:  # of a file that must not compile
            source, include = str(ROOT / block["file"]), f"-I{ROOT / 'include'}"
            output = run(["g++", "-std=c++20", "-fsyntax-only", include, source]).stderr
        elif block["file"] and block["region"] is None:
            Path(Path(block["file"]).name).write_text(block["text"])
        elif block["language"] == "sh":
            done = run(["bash", "-euo", "pipefail", "-c", block["text"]])
            output = done.stdout + done.stderr
            assert done.returncode == 0, f"{block['text']}\n{output}"
        elif block["language"] == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(block["text"], names)
            output = out.getvalue()
        if block["language"] == "text":
            assert said(block["text"], output), f"{block['text']}\nwas not printed:\n{output}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/python/project/test_docs.py --write")
    for path in DOCS:
        text = path.read_text()
        if text != refreshed(text):
            path.write_text(refreshed(text))
            print(f"refreshed {path.relative_to(ROOT)}")
