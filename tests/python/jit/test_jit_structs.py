"""What a struct may look like and what its fields may be given: the compiler says, not its text."""

from __future__ import annotations

import copy
import pickle
import shutil
from fractions import Fraction

import numpy as np
import pytest
from sources import ADAGRAD

import coldrow
from coldrow import _core
from coldrow.jit import CompileError, decay, optimizer

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
CALL = "COLDROW_HD float operator()(std::int32_t, float) const {{ return {}; }}"


def factor(policy):
    update = coldrow.policies.compiled(coldrow.RowUpdate(decay=policy))
    return _core.factor(update, 1, 5, 0.1, 0, False)


RIGHT = {
    "methods before fields": "struct Own { " + CALL.format("b - a") + " float a; float b; };",
    "used in the other order": "struct Own { float a; float b; " + CALL.format("b - a") + " };",
    "an earlier struct whose name begins the same":
        "struct OwnParams { float b; float a; };\nstruct Own { float a; float b; " + CALL.format("b - a") + "};",
    "declared before it is defined":
        "struct Own;\nstruct B { float b; float a; };\nstruct Own { float a, b; " + CALL.format("b - a") + "};",
    "a macro": "#define FIELDS float b; float a;\nstruct Own { FIELDS " + CALL.format("b - a") + "};",
    "a raw string": 'constexpr char k[] = R"(struct Own { float b; )";\nstruct Own { float a; float b; '
        + CALL.format("b - a") + "};",
    "a base": "struct Base { float b; };\nstruct Own : Base { float a; "
        "COLDROW_HD Own() : Base{7}, a(7) {} " + CALL.format("b - a") + "};",
    "a constructor": "struct Own { float b, a; COLDROW_HD Own() : b(7), a(7) {} " + CALL.format("b - a") + "};",
    "const fields": "struct Own { const float b; const float a; " + CALL.format("b - a") + "};",
    "an anonymous struct in it": "struct Own { double x = 1; float b; struct { float c; } in{}; float a; "
        + CALL.format("b - a + in.c") + "};",
    "an alias of a template": "template <class T> struct Of { T b; T a; " + CALL.format("b - a")
        + " };\nusing Own = Of<float>;",
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_structs_that_are_right(what):
    for given in ({"a": 0.25, "b": 1.0}, {"b": 1.0, "a": 0.25}):
        assert factor(decay("Own", RIGHT[what], **given)) == 0.75


@pytest.mark.parametrize(
    "what", [w for w in RIGHT if w not in ("a constructor", "a base", "an alias of a template")]
)
def test_a_field_that_was_not_given(what):
    for given in ("a", "b"):
        with pytest.raises(
            TypeError, match=r"^Own: (field '[ab]'|a field) has no default and was not"
        ):
            decay("Own", RIGHT[what], **{given: 0.5})


def test_a_base_that_may_have_fields_that_are_not_given():
    source = RIGHT["a base"].replace("COLDROW_HD Own() : Base{7}, a(7) {} ", "")
    with pytest.raises(
        TypeError, match=r"^Own: (has a base class, whose fields may not|a field has no)"
    ):
        decay("Own", source, a=0.5)
    with pytest.raises(TypeError, match=r"^Own: (field|a field|has a base)"):
        decay("Own", source)


@pytest.mark.parametrize("name", ["c", "k", "f", "operator", "x"])
def test_what_is_no_field(name):
    source = ("struct Own { float a = 1; static constexpr float k = 1; "
              "COLDROW_HD float f() const { return 1; } " + CALL.format("a") + " };")  # fmt: skip
    with pytest.raises(
        (TypeError, CompileError), match=rf"^Own (has no field '{name}'|does not comp)"
    ):
        decay("Own", source, **{name: 1})


FIELD = "struct Own {{ {} n; " + CALL.replace("{}", "n == {} ? 1.0f : 0.5f") + " }};"
LIMITS = {
    "std::int8_t": (-128, 127),
    "std::int32_t": (-(2**31), 2**31 - 1),
    "std::int64_t": (-(2**63), 2**63 - 1),
    "std::uint32_t": (0, 2**32 - 1),
    "std::uint64_t": (0, 2**64 - 1),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_whole_numbers_are_exact_or_refused(kind):
    low, high = LIMITS[kind]
    literal = {2**64 - 1: "18446744073709551615ull", -(2**63): "INT64_MIN"}
    for value in {low, low + 1, high - 1, high, min(high, 2**53 + 1)}:
        own = decay("Own", FIELD.format(kind, literal.get(value, value)), n=value)
        assert factor(own) == 1.0, value
        assert own.n == value
        for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            assert other == own
            assert other.n == value
        described = coldrow.RowUpdate(decay=own).to_dict()
        assert coldrow.RowUpdate.from_dict(described).decay == own
    for wrong in (low - 1, high + 1, -(2**70), 2**70, 0.5, low - 1.0e19, 1e300):
        with pytest.raises(
            ValueError, match=r"^n: got .*, accepted: a value that the field can hold"
        ):
            decay("Own", FIELD.format(kind, 0), n=wrong)


def test_numbers_of_all_kinds():
    source = FIELD.format("std::int64_t", 2**53 + 1)
    assert factor(decay("Own", source, n=np.int64(2**53 + 1))) == 1.0
    assert decay("Own", source, n=3) == decay("Own", source, n=3.0)
    assert repr(decay("Own", source, n=3)) == "Own(n=3.0)"
    assert repr(decay("Own", source, n=2**53 + 1)) == "Own(n=9007199254740993)"
    flag = FIELD.format("bool", "true")
    assert factor(decay("Own", flag, n=True)) == 1.0
    with pytest.raises(ValueError, match=r"^n: got 2.0, accepted: a value that the field can hold"):
        decay("Own", flag, n=2)
    real = FIELD.format("double", "1.0 / 3")
    assert factor(decay("Own", real, n=Fraction(1, 3))) == 1.0
    word = "enum class Kind { one, two }; " + FIELD.format("Kind", "Kind::two")
    assert factor(decay("Own", word, n=1)) == 1.0
    narrow = "struct Own { unsigned n : 3; " + CALL.format("n == 7 ? 1.0f : 0.5f") + " };"
    assert factor(decay("Own", narrow, n=7)) == 1.0
    with pytest.raises(ValueError, match=r"^n: got 8.0, accepted: a value that the field can hold"):
        decay("Own", narrow, n=8)
    for wrong in (10**400, 1j, "1", None, [1]):
        with pytest.raises(TypeError, match=r"^n: got .*, accepted: a finite number"):
            decay("Own", real, n=wrong)


@pytest.mark.parametrize("value", [1e300, -1e39, 1e-46, 2**200])
def test_a_float_that_would_become_another_is_refused(value):
    """Infinite or zero; numbers between are rounded."""
    with pytest.raises(ValueError, match=r"^n: got .*, accepted: a value that the field can hold"):
        decay("Own", FIELD.format("float", "0.1f"), n=value)
    assert factor(decay("Own", FIELD.format("float", "0.1f"), n=0.1)) == 1.0


def test_a_field_that_is_no_number():
    with pytest.raises(CompileError, match=r"^Own: field 'n' cannot be given: it is no number"):
        decay("Own", "struct Own { float n[2] = {}; " + CALL.format("n[0]") + " };", n=1)


# ------------------------------------------------------------------------------------------- states


def states(scalars, vectors, names):
    listed = ", ".join("nullptr" if name is None else f'"{name}"' for name in names)
    replaced = ADAGRAD.replace("scalar_states = 0", f"scalar_states = {scalars}")
    replaced = replaced.replace("vector_states = 1;", f"""vector_states = {vectors};
      static constexpr const char* state_name(int i) {{
        constexpr const char* names[] = {{{listed}}};
        return names[i];
      }}""")  # fmt: skip
    return optimizer("Copy", replaced.replace("v[0]", "(v[0])"))


@pytest.mark.parametrize(("scalars", "vectors"), [(-1, 0), (-1, 2), (0, -1), (2, -1), (-2, 3)])
def test_negative_counts(scalars, vectors):
    with pytest.raises(
        CompileError, match=r"^Copy: scalar_states and vector_states are counts, 0 to 4"
    ):
        states(scalars, vectors, "abcdef")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a", "a"], r"state_name\(1\) is 'a', accepted: a C\+\+ name other than 'prev_iter', 'a'"),
        (
            ["prev_iter", "a"],
            r"state_name\(0\) is 'prev_iter', accepted: a C\+\+ name other than 'prev_",
        ),
        (["a", ""], r"state_name\(1\) is '', accepted: a C\+\+ name"),
        (["a.b", "c"], r"state_name\(0\) is 'a.b', accepted: a C\+\+ name"),
        (["a", None], r"state_name\(1\) is None, accepted: a C\+\+ name"),
        (["\u00e4", "b"], r"state_name\(0\) is '\u00e4', accepted: a C\+\+ name"),
    ],
)
def test_names_that_cannot_be_told_apart(given, says):
    with pytest.raises(ValueError, match=rf"^Copy: {says}"):
        states(1, 1, given)


def test_eight_states():
    update = coldrow.RowUpdate(states(4, 4, "abcdefgh"))
    assert update.state_names == ("prev_iter", *"abcdefgh")
    weight = np.ones((4, 9), np.float32)
    state = coldrow.init_state(update, 4, 9, weight)
    assert [state[n].shape for n in "ae"] == [(4,), (4, 9)]
    coldrow.apply_(update, weight, np.ones((2, 9), np.float32), np.array([0, 1]), state, step=1)


# -------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    "value", ["expf(-1.0f)", "std::exp(-1.0f)", "std::sqrt(0.25f)", "float(std::pow(2.0, -1))", "fabsf(-.5f)"]
)  # fmt: skip
def test_standard_mathematics_is_there(value):
    assert 0.3 < factor(decay("Own", "struct Own { " + CALL.format(value) + " };")) < 0.6
