"""The recipes of docs/architecture.md, followed in a copy of the sources.

They are diffs, of four files each. What they make is compiled into a program (not into the module, which would
take minutes; COLDROW_RECIPE_MODULE=1 does), that chooses policies by name as the module does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coldrow import _core

ROOT = next(folder for folder in Path(__file__).parents if (folder / "CMakeLists.txt").is_file())
PAGE = ROOT / "docs" / "architecture.md"
CXX = os.environ.get("CXX", "g++")

# Trains one row of four columns by a policy of each kind, chosen by name, and prints the row after each step, twice:
# as the library has it and as the reference.
PROGRAM = r"""
#include <coldrow/reference.hpp>
#include <coldrow/row/update.hpp>
#include <coldrow/policy/any_decay.hpp>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace coldrow;

template <class P, class R>
void take_fields(int count, char** given, const char* kind, P& policy, R& reference) {
  for (int i = 0; i + 2 < count; i += 3) {
    if (std::strcmp(given[i], kind) != 0) continue;
    const double value = std::atof(given[i + 2]);
    if (!set_field(policy, given[i + 1], value) || !reference.fields.set(given[i + 1], value)) std::exit(3);
  }
}

// optimizer's name, decay's name, then (kind, field, value) each.
int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const int optimizer_number = policy_number<BuiltinOptimizers>(argv[1]);
  const int decay_number = policy_number<BuiltinDecays>(argv[2]);
  if (optimizer_number < 0 || decay_number < 0) return 4;
  AnyDecay decay;
  reference::Update expected;
  with_type_at<BuiltinDecays>(decay_number, [&](auto one) {
    typename decltype(one)::type policy{};
    expected.decay = policy;
    take_fields(argc - 3, argv + 3, "decay", policy, expected.decay);
    decay = policy;
  });
  with_type_at<BuiltinOptimizers>(optimizer_number, [&](auto one) {
    using Optimizer = typename decltype(one)::type;
    Optimizer optimizer{};
    expected.optimizer = optimizer;
    take_fields(argc - 3, argv + 3, "optimizer", optimizer, expected.optimizer);
    float weight[4] = {1, 1, 1, 1}, scalars[4] = {}, vectors[4][4] = {};
    double weight64[4] = {1, 1, 1, 1}, momentum1[4] = {}, momentum2[4] = {}, touches[4] = {};
    std::int32_t prev_iter = 0;
    std::int64_t prev_iter64 = 0, index = 0;
    const float grad[4] = {0.5f, -0.25f, 1.0f, 0.0f};
    const double grad64[4] = {0.5, -0.25, 1.0, 0.0};
    for (const std::int32_t step : {1, 4, 5, 20}) {
      using Update = RowUpdate<float, float, Optimizer, AnyDecay, Nearest>;
      Row<float, Optimizer> row{weight, &prev_iter, {}, {}};
      for (int i = 0; i < Optimizer::scalar_states; ++i) row.scalars[i] = &scalars[i];
      for (int i = 0; i < Optimizer::vector_states; ++i) row.vectors[i] = vectors[i];
      Update::at(step, 0.125, optimizer, decay)(Serial{}, row, grad, 4, {});
      reference::apply(expected, weight64, 4, {&prev_iter64, momentum1, momentum2, touches}, grad64, &index, 1,
                       step, 0.125, 0);
      for (const float w : weight) std::printf("%.9g ", static_cast<double>(w));
      for (const double w : weight64) std::printf("%.17g ", w);
      std::printf("\n");
    }
  });
}
"""

TRAIN = """
import json, sys, coldrow
from coldrow.policies import native_arguments
update = eval(sys.argv[1], vars(coldrow))
print(json.dumps([coldrow.__file__, native_arguments(update)]))
"""


def recipe(section: str) -> dict[str, list[list[str]]]:
    """The hunks of each file that a section of the page shows: lines with ' ', '-' or '+' before them."""
    text = re.search(rf"^## {section}\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    files: dict[str, list[list[str]]] = {}
    hunks: list[list[str]] = []
    for block in re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("--- "):
                hunks = files.setdefault(line[4:], [])
                hunks.append([])
            elif line == "@@":
                hunks.append([])
            else:
                hunks[-1].append(line)
    return files


def apply(root: Path, files: dict[str, list[list[str]]]) -> None:
    for name, hunks in files.items():
        text = (root / name).read_text()
        for hunk in hunks:
            old = "".join(line[1:] + "\n" for line in hunk if line[:1] in (" ", "-", ""))
            new = "".join(line[1:] + "\n" for line in hunk if line[:1] in (" ", "+", ""))
            assert text.count(old) == 1, f"{name} has not once, as the recipe says:\n{old}"
            text = text.replace(old, new)
        (root / name).write_text(text)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A copy of the sources in which both recipes were followed, and the program made of it."""
    if shutil.which(CXX) is None:
        pytest.skip("needs a C++ compiler")
    root = tmp_path_factory.mktemp("recipe")
    for folder in ("include", "bindings", "python"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "python" / "coldrow" / Path(_core.__file__).name).write_bytes(
        Path(_core.__file__).read_bytes()
    )
    for section in ("Adding a decay policy", "Adding an optimizer"):
        apply(root, recipe(section))
    (root / "program.cpp").write_text(PROGRAM)
    flags = [
        "-std=c++20",
        "-O0",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Wconversion",
        "-Werror",
    ]
    subprocess.run(
        [CXX, *flags, "-Wno-sign-conversion", "-Iinclude", "program.cpp", "-o", "program"],
        cwd=root,
        check=True,
    )
    return root


def test_each_recipe_has_four_files():
    decay, optimizer = recipe("Adding a decay policy"), recipe("Adding an optimizer")
    common = {
        "include/coldrow/reference.hpp",
        "python/coldrow/policies.py",
        "python/coldrow/__init__.py",
    }
    assert set(decay) == common | {"include/coldrow/policy/decay.hpp"}
    assert set(optimizer) == common | {"include/coldrow/policy/optimizer.hpp"}


def environment(root: Path) -> dict[str, str]:
    """Python's own environment, but for the copy's package."""
    path = [str(root / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def native(root: Path, update: str) -> dict:
    """What the copy's Python hands to C++ for an update."""
    out = subprocess.run(
        [sys.executable, "-c", TRAIN, update],
        env=environment(root),
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    file, arguments = json.loads(out.stdout)
    assert Path(file).is_relative_to(root)
    return arguments


def train(root: Path, update: str) -> tuple[list[list[float]], list[list[float]]]:
    """The row after steps 1, 4, 5 and 20: the library's, and the reference's."""
    arguments = native(root, update)
    fields = [
        str(x)
        for kind in ("optimizer", "decay")
        for name, value in arguments[f"{kind}_fields"].items()
        for x in (kind, name, value)
    ]
    out = subprocess.run(
        [root / "program", arguments["optimizer"], arguments["decay"], *fields],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [[float(x) for x in line.split()] for line in out.stdout.splitlines()]
    return [row[:4] for row in rows], [row[4:] for row in rows]


GRADIENT = (0.5, -0.25, 1.0, 0.0)
GAPS = (1, 3, 1, 15)  # the first touch counts as 1


def test_the_new_decay_trains_as_its_formula_says(scratch):
    got, reference = train(scratch, "RowUpdate(SGD(), Hyperbolic(rate=0.5))")
    want = [1.0] * 4
    for gap, row, exact in zip(GAPS, got, reference, strict=True):
        want = [w / (1 + 0.5 * gap) - 0.125 * g for w, g in zip(want, GRADIENT, strict=True)]
        assert exact == pytest.approx(want, rel=1e-14)
        assert row == pytest.approx(want, rel=1e-6)


def test_the_new_optimizer_trains_as_its_formula_says(scratch):
    got, reference = train(scratch, "RowUpdate(SignSGD(), Hyperbolic(rate=0.25))")
    want = [1.0] * 4
    for gap, row, exact in zip(GAPS, got, reference, strict=True):
        signs = [(g > 0) - (g < 0) for g in GRADIENT]
        want = [w / (1 + 0.25 * gap) - 0.125 * s for w, s in zip(want, signs, strict=True)]
        assert exact == pytest.approx(want, rel=1e-14)
        assert row == pytest.approx(want, rel=1e-6)


def test_what_was_there_is_as_it_was(scratch):
    got, reference = train(scratch, "RowUpdate(Adam(), Exponential(half_life=5.0))")
    for row, exact in zip(got, reference, strict=True):
        assert row == pytest.approx(exact, rel=1e-5)


def test_what_is_forgotten_does_not_compile(tmp_path):
    """The reference is told by the compiler; a policy without a name by a sentence."""
    shutil.copytree(ROOT / "include", tmp_path / "include")
    files = recipe("Adding a decay policy")
    apply(tmp_path, {name: files[name] for name in files if name.endswith("decay.hpp")})
    source = tmp_path / "all.cpp"
    source.write_text("#include <coldrow/reference.hpp>\n")
    command = [CXX, "-std=c++20", "-fsyntax-only", f"-I{tmp_path}/include", source]
    says = subprocess.run(command, capture_output=True, text=True)
    assert "a built-in decay has a factor() in coldrow/reference.hpp" in says.stderr
    header = tmp_path / "include/coldrow/policy/decay.hpp"
    header.write_text(
        header.read_text().replace('static constexpr const char* name = "hyperbolic";', "")
    )
    says = subprocess.run(command, capture_output=True, text=True)
    assert "a built-in policy has a name, and its fields by name" in says.stderr


@pytest.mark.skipif(
    "COLDROW_RECIPE_MODULE" not in os.environ, reason="compiles the module: minutes"
)
def test_the_module(scratch):
    """All of it: the module compiled from the copy, and both policies used through Python."""
    shutil.copy(ROOT / "CMakeLists.txt", scratch)
    build = scratch / "build"
    options = ["-DCOLDROW_PYTHON=ON", "-DCOLDROW_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-S", scratch, "-B", build, *options], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "_core", "-j2"], check=True)
    shutil.copy(next(build.glob("_core*.so")), scratch / "python" / "coldrow")
    code = """
import coldrow, numpy as np
w, p = np.ones((1, 4), np.float32), np.zeros(1, np.int32)
update = coldrow.RowUpdate(coldrow.SignSGD(), coldrow.Hyperbolic(rate=0.25))
for step in (1, 4, 5, 20):
    g = np.array([[0.5, -0.25, 1.0, 0.0]], np.float32)
    coldrow.apply_(update, w, g, np.array([0]), {"prev_iter": p}, step=step, lr=0.125)
print(*w[0])
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(scratch),
        check=True,
        capture_output=True,
        text=True,
    )
    got, _ = train(scratch, "RowUpdate(SignSGD(), Hyperbolic(rate=0.25))")
    assert [float(x) for x in out.stdout.split()] == pytest.approx(got[-1], rel=1e-6)
