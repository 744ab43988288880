"""How the site is built: `make docs`. Warnings are errors."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import cpp_reference  # noqa: E402

import coldrow  # noqa: E402

project = "coldrow"
author = "the authors of coldrow"
version = release = coldrow.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["*.py", "__pycache__"]
# Reference pages of modules that this version does not have.
exclude_patterns += [
    f"reference/{page.name}"
    for page in (DOCS / "reference").glob("coldrow*.md")
    if not (module := ROOT / "python" / page.stem.replace(".", "/")).is_dir()
    and not module.with_suffix(".py").is_file()
]
# Modules that coldrow builds upon where they are installed; not here.
autodoc_mock_imports = ["torchrec", "fbgemm_gpu"]

myst_heading_anchors = 3
# A reference to a name of coldrow that does not exist is an error. Other names (torch.Tensor, ...) would
# need the network, and those of type variables and of private classes have no page.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!coldrow\.).*"), ("py:.*", r"coldrow\..*\._.*")]
# What public classes are made of (docs/architecture.md), named in signatures.
nitpick_ignore_regex += [
    ("py:class", r"coldrow\.nn\.(autograd|optimizer|table|table_batch|tables)\.\w+"),
    ("py:class", r"coldrow\.(distributed\.(request|shards)|compat\.fbgemm\.state)\.\w+"),
]
# Classes that TorchRec makes, named in signatures.
nitpick_ignore_regex += [("py:class", r"coldrow\.torchrec\.Sharded\w+")]

autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = f"coldrow {version}"
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "coldrow"},
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
}
html_sidebars = {"**": ["sidebar-nav-bs"], "index": []}
copyright = "the authors of coldrow, BSD-3-Clause"


# Documents that live outside this folder, and their pages.
ELSEWHERE = {
    "README.md": "project/readme",
    "CONTRIBUTING.md": "project/contributing",
    "CHANGELOG.md": "project/changelog",
    "benchmarks/README.md": "project/benchmarks",
    "benchmarks": "project/benchmarks",
}


def relocated(text, origin, docname):
    """Let links of a document of the repository lead to pages of the site, where there are any."""

    def relocate(link):
        target = Path(os.path.normpath(origin.parent / link[2]))
        inside = target.relative_to(ROOT).as_posix()
        if inside in ELSEWHERE:
            target = DOCS / f"{ELSEWHERE[inside]}.md"
        elif target.suffix in cpp_reference.KINDS and target.is_relative_to(cpp_reference.HEADERS):
            return f"[{link[1]}](#{cpp_reference.anchor(target)})"
        elif target.is_dir():  # has no page
            return link[1]
        return f"[{link[1]}]({os.path.relpath(target, (DOCS / docname).parent)}{link[3] or ''})"

    return re.sub(r"\[([^][]*)\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)", relocate, text)


def filled_in(text, docname):
    """Put pages in place of patterns in a table of contents: those that no line before names."""
    folder = (DOCS / docname).parent
    lines = text.split("\n")
    taken = {"index", *lines}
    for i, pattern in enumerate(lines):
        if re.fullmatch(r"[\w./-]*\*", pattern):
            pages = sorted(
                page.relative_to(folder).with_suffix("").as_posix()
                for page in folder.glob(f"{pattern}.md")
                if page.relative_to(DOCS).as_posix() not in exclude_patterns
            )
            lines[i] = "\n".join(page for page in pages if page not in taken)
            taken.update(pages)
    return "\n".join(lines)


def before_parsing(app, docname, source):
    """Fill in what pages ask for."""
    text = source[0]
    if found := re.fullmatch(r"<!-- file: (\S+) -->\n", text):
        text = relocated((ROOT / found[1]).read_text(), ROOT / found[1], docname)
    elif Path(docname).name == "index":
        text = relocated(filled_in(text, docname), DOCS / f"{docname}.md", docname)
    elif "/" not in docname:
        text = relocated(text, DOCS / f"{docname}.md", docname)
    source[0] = cpp_reference.filled_in(text)


def setup(app):
    """Connect what fills in pages."""
    app.connect("source-read", before_parsing)
