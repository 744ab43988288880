"""The site in build/docs, which ``make docs`` builds before it runs this."""

import ast
import re
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs"
sys.path.insert(0, str(ROOT / "docs"))
import cpp_reference  # noqa: E402


def public() -> dict[str, list[str]]:
    """``__all__`` of the modules that have a page, read and not imported: some need what is not here."""
    found = {}
    for page in sorted((ROOT / "docs" / "reference").glob("coldrow*.md")):
        path = ROOT / "python" / page.stem.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(path.read_text()).body if path.exists() else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found[page.stem] = ast.literal_eval(node.value)
    return found


def test_the_modules_that_users_import_have_pages():
    assert {"coldrow", "coldrow.nn", "coldrow.optim", "coldrow.jit"} <= public().keys()
    assert {"coldrow.checkpoint", "coldrow.cuda"} <= public().keys()


@pytest.fixture(scope="module")
def documented():
    inventory = InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="")
    return {
        name: item.uri
        for kind, items in inventory.data.items()
        if kind.startswith("py:")
        for name, item in items.items()
    }


@pytest.mark.parametrize("module", public())
def test_every_public_name_is_in_the_reference(module, documented):
    missing = [
        name
        for name in public()[module]
        if not documented.get(f"{module}.{name}", "").startswith("reference/")
    ]
    assert not missing, f"{module}: not on its page in docs/reference: {missing}"


def test_every_public_method_is_in_the_reference(documented):
    from coldrow.nn import TableBatchedEmbeddingBags

    methods = [name for name in vars(TableBatchedEmbeddingBags) if not name.startswith("_")]
    assert not [
        name for name in methods if f"coldrow.nn.TableBatchedEmbeddingBags.{name}" not in documented
    ]


def test_every_header_is_in_the_reference():
    pages = "".join(page.read_text() for page in (SITE / "reference").glob("cpp*.html"))
    found = [h for kind in cpp_reference.KINDS for h in cpp_reference.HEADERS.rglob(f"*{kind}")]
    assert len(found) > 20
    missing = [h for h in found if f'id="{cpp_reference.anchor(h)}"' not in pages]
    assert not missing, f"no page (docs/reference/cpp-<folder>.md) shows {missing}"


def test_bodies_and_private_parts_are_not_shown():
    text = """
template <class T>
struct Shown {  // a comment with { and }
  int field = 0;
  Kind kind{};
  struct Inner {
    int inner;

   private:
    int hidden;
  };

  // Does it.
  int f(int x) const { return x ? g('{') : h("}"); }

 private:
  void g() { while (true) { } }
  int hidden;
};
int other();
"""
    assert cpp_reference.declaration(text) == (
        "template <class T>\nstruct Shown {  // a comment with { and }\n  int field = 0;\n"
        "  Kind kind{};\n  struct Inner {\n    int inner;\n  };\n\n  // Does it.\n"
        "  int f(int x) const;\n};"
    )
    assert cpp_reference.name_of("template <class A, B<int> C>\nauto f(int x);") == "f"
    shown = "".join(
        cpp_reference.page(h).split(".hpp).\n", 1)[1] for h in cpp_reference.headers("policy")
    )
    assert "private:" not in shown
    assert "return" not in re.sub(r"//.*", "", shown)


def test_nothing_is_loaded_from_elsewhere():
    loads = re.compile(
        r'<(?:script|img|iframe)\b[^>]*\bsrc="(?:https?:)?//[^"]*|<link\b(?![^>]*canonical)[^>]*\bhref="(?:https?:)?//[^"]*'
    )
    pages = list(SITE.rglob("*.html"))
    assert len(pages) > 20
    assert not {match for page in pages for match in loads.findall(page.read_text())}
    sheets = [*SITE.rglob("*.css")]
    assert not [s for s in sheets if re.search(r'(?:@import|url\()\s*["\']?https?:', s.read_text())]
