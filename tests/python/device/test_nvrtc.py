"""The headers for device code under NVRTC, which has no standard library; no GPU is needed."""

import functools
import locale
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coldrow import _nvrtc, _paths

KERNEL = """
#include <coldrow/table/table.hpp>

// A decay of one's own: nothing during a warm-up, then a half-life.
struct WarmHalfLife {
  float half_life;
  std::int32_t warm_up;
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    if (gap <= warm_up) return 1.0f;
    return static_cast<float>(coldrow::exp2_fixed((warm_up - gap) / double{half_life}));
  }
};

using Optimizer = coldrow::RowwiseRMSprop;
using Update = coldrow::RowUpdate<coldrow::bfloat16, float, Optimizer, WarmHalfLife,
                                  coldrow::Stochastic>;

extern "C" __global__ void train(Update update, coldrow::Table<coldrow::bfloat16, Optimizer> table,
                                 const float* grad) {
  const std::int64_t r = blockIdx.x;
  update(coldrow::Warp{}, table.row(r), grad + r * table.dim, table.dim, table.key(r));
}
"""


def test_is_installed():
    """CI has it, so that the tests below are not all skipped there."""
    if "COLDROW_REQUIRE_ALL_TESTS" in os.environ:
        assert _nvrtc.load().version >= (12, 4)


@pytest.fixture
def compile():
    try:
        _nvrtc.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return functools.partial(_nvrtc.compile, name="own.cu")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_row_update_with_an_own_decay(compile):
    cubin = compile(KERNEL, arch="sm_90")
    assert cubin.startswith(b"\x7fELF")
    assert b"train" in cubin
    ptx = compile(KERNEL, arch="compute_90")
    assert b".entry train(" in ptx
    assert b".target sm_90" in ptx


@pytest.mark.parametrize(
    "header",
    ["platform.hpp", "nvrtc_std.hpp", "numeric/", "policy/", "row/", "table/table.hpp"],
)
def test_headers_for_device_code_compile_alone(compile, header):
    root = _paths.includes()
    path = root / "coldrow" / header
    found = sorted(path.glob("*.hpp")) if header.endswith("/") else [path]
    assert found
    for file in found:
        include = f"#include <{file.relative_to(root)}>\n"
        compile(include + include, arch="compute_90")


def test_strict_flags(compile):
    source = 'extern "C" __global__ void f(float* x) { x[0] = x[0] * x[1] + x[2]; }'
    assert b"fma" not in compile(source, arch="compute_90")
    loose = _nvrtc.load().compile(source, "loose.cu", ["-arch=compute_90"])
    assert b"fma" in loose


def test_error_points_at_the_line(compile):
    with pytest.raises(_nvrtc.CompileError, match=r'own\.cu\(2\): error: identifier "y"') as error:
        compile("__device__ float f(float x) {\n  return y;\n}", arch="sm_90")
    assert error.value.log.startswith("own.cu(2)")


def test_unknown_option_is_an_error(compile):
    with pytest.raises(_nvrtc.CompileError, match="--no-such-option"):
        compile("", arch="sm_90", options=["--no-such-option"])


def test_compiler_warning_is_a_warning(compile):
    with pytest.warns(UserWarning, match=r'own\.cu\(1\): warning.*"unused"'):
        compile("__device__ void f() { int unused; }", arch="sm_90")


def test_locale_stays(compile):
    # A new thread has the process's locale, whatever happened to this one's.
    with ThreadPoolExecutor(1) as thread:
        before = thread.submit(locale.nl_langinfo, locale.CODESET).result()
        thread.submit(compile, "", arch="sm_90").result()
        assert thread.submit(locale.nl_langinfo, locale.CODESET).result() == before


def test_a_standard_library_of_ones_own(compile):
    own = Path(_paths.includes(), "coldrow/nvrtc_std.hpp").read_text().replace("#pragma once", "")
    source = f"{own}\n#define COLDROW_NVRTC_HAS_STD\n{KERNEL}"
    compile(source, arch="compute_90")


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(_nvrtc, "candidates", lambda: iter(["libnvrtc-absent.so"]))
    monkeypatch.setattr(_nvrtc, "load", _nvrtc.load.__wrapped__)
    with pytest.raises(FileNotFoundError, match=r"pip install nvidia-cuda-nvrtc.*\n.*absent"):
        _nvrtc.compile("", "own.cu", "sm_90")
