"""The C++ reference: pages made from the headers' own comments while the site is built.

Where a page says ``<!-- headers: policy -->`` come the headers of ``include/coldrow/policy``, and for
``<!-- headers: . -->`` those of the folder itself: the comment at the top of the file, then each
declaration that a comment stands above, as it is written but for the bodies of functions and what is
private.

``python docs/cpp_reference.py policy`` prints what goes there.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "include" / "coldrow"
# A comment, a string, a character, or any one character.
KINDS = (".hpp", ".cuh")
MARKS = ("COLDROW_BEGIN", "COLDROW_END")
TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|.', re.DOTALL)
LABEL = re.compile(r"(private|public):")
# Types and concepts are shown without a comment too: that of the file may be theirs.
TYPE = re.compile(r"(template\b[^{};]*?>\s*)?(struct|class|enum|concept)\b")
NOT_DOCUMENTED = re.compile(r"//\s*(clang-format|NOLINT|[-=]{3})|//\s*\(|/\*")


def anchor(header: Path) -> str:
    """The name of a header's heading, for links."""
    return "cpp-" + re.sub(r"[\W_]+", "-", str(header.relative_to(HEADERS).with_suffix("")))


def prose(comment: list[str]) -> str:
    """Markdown of the lines of a comment: what is indented is code, the rest is text."""
    lines = [re.sub(r"^\s*// ?", "", line) for line in comment]
    out, code = [], False
    for line in lines:
        deep = line.startswith("  ")
        if deep != code and (deep or line.strip()):
            while out and not out[-1]:
                out.pop()
            out += ["", "```text"] if deep else ["```", ""]
            code = deep
        if code:
            out.append(line)
        else:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([\\`*_<>\[\]{}$#|~])", r"\\\1", part) for part in parts[::2]]
            out.append("".join(parts))
    return "\n".join([*out, "```"] if code else out).strip("\n") + "\n"


def declaration(text: str) -> str:
    """The declaration that the text begins with, without bodies of functions and private parts."""
    tokens = [match[0] for match in TOKEN.finditer(text)]
    out: list[str] = []
    depth, i = 0, 0
    hidden = 0  # depth of the type whose private part this is
    while i < len(tokens):
        token = tokens[i]
        if token in "pu" and (label := LABEL.match("".join(tokens[i : i + 9]))):
            if label[1] == "private" and not hidden:
                hidden = depth
                out = ["".join(out).rstrip(" ")]
            elif label[1] == "public" and hidden == depth:
                hidden = 0
        if token == "{":
            head = re.split(r"[;{}]", re.sub(r"//[^\n]*", "", "".join(out)))[-1]
            is_function = re.search(r"\)[\w\s:>\-]*$", head) and "concept" not in head
            if is_function and not hidden:
                i = end_of_block(tokens, i)
                out = ["".join(out).rstrip() + ";"]
                if depth == 0:
                    break
                continue
            depth += 1
        elif token == "}":
            depth -= 1
            if depth < hidden:
                hidden = 0
                out.append("  " * depth)
        if not hidden:
            out.append(token)
        if token == ";" and depth == 0:
            break
        i += 1
    shown = re.sub(r"[ \t]+$", "", "".join(out), flags=re.MULTILINE)
    return re.sub(r"\n{2,}(?=\s*})", "\n", re.sub(r"\n{3,}", "\n\n", shown)).strip()


def end_of_block(tokens: list[str], i: int) -> int:
    """The place after the brace that closes the one at i."""
    depth = 0
    while True:
        depth += (tokens[i] == "{") - (tokens[i] == "}")
        i += 1
        if depth == 0:
            return i


def name_of(shown: str) -> str:
    """The name that a declaration introduces, or nothing."""
    flat = re.sub(r"//[^\n]*|__launch_bounds__\([^)]*\)", "", shown)
    while re.match(r"\s*template\s*<", flat):  # without its parameters
        start = flat.index("<")
        depth, end = 0, start
        for end in range(start, len(flat)):
            depth += (flat[end] == "<") - (flat[end] == ">")
            if depth == 0:
                break
        flat = flat[end + 1 :]
    for pattern in (
        r"\s*(?:struct|class|enum class|enum|concept|using)\s+(\w+)",
        r"[^(=;{]*?(\w+|operator\S+)\s*\(",
        r"[^=;{]*?(\w+)\s*(?:=|;|\{)",
    ):
        if found := re.match(pattern, flat):
            return found[1]
    return ""


def page(header: Path) -> str:
    """Markdown of one header."""
    lines = header.read_text().splitlines()
    path = header.relative_to(HEADERS.parent)
    end = next(i for i, line in enumerate(lines) if not line.startswith("//"))
    out = [f"({anchor(header)})=", f"## `{path}`", "", prose(lines[:end])]
    out.append(f"[The file](../../include/{path}).\n")
    begin, end = (lines.index(mark) if mark in lines else 0 for mark in MARKS)
    i, seen = begin + 1, set()
    while i < end:
        first = i
        while i < end and lines[i].startswith("//"):
            i += 1
        comment = [] if NOT_DOCUMENTED.match(lines[first]) else lines[first:i]
        text = "\n".join(lines[i:end])
        if (comment and re.match(r"(?!namespace)[\w\[]", text)) or TYPE.match(text):
            shown = declaration(text)
            name = name_of(shown)
            if name and (comment or name not in seen):
                out += [f"### `{name}`", "", *([prose(comment)] if comment else [])]
                out += ["```cpp", shown, "```", ""]
                seen.add(name)
            i += shown.count("\n") if TYPE.match(text) else 0
        i += 1
    return "\n".join(out)


def headers(folder: str) -> list[Path]:
    """The headers of a folder in include/coldrow, in order of their names."""
    return sorted(file for kind in KINDS for file in (HEADERS / folder).glob(f"*{kind}"))


def filled_in(text: str) -> str:
    """Put the headers where a page asks for them."""
    return re.sub(
        r"<!-- headers: (\S+) -->",
        lambda match: "\n".join(page(header) for header in headers(match[1])),
        text,
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/cpp_reference.py FOLDER")
    print("\n".join(page(header) for header in headers(sys.argv[1])))
