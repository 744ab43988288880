"""The C++ around a user's struct: what it must be, its fields from numbers, and what is exported."""

from __future__ import annotations

from collections.abc import Sequence

_WRAPPER = """\
#include <cmath>
#include <limits>
#include <math.h>
#include <{header}>

#include "{file}"

namespace {{
using Policy = ::{name};
{checks}
#define COLDROW_EXPORT extern "C" __attribute__((visibility("default")))

// A number as Python has it: an integer below 2^64 that no double holds, else a double.
struct Number {{
  double real;
  unsigned long long magnitude;
  int sign;  // 0: it is `real`
}};

template <class T>
struct UnderlyingOf {{ using type = T; }};
template <class T>
  requires std::is_enum_v<T>
struct UnderlyingOf<T> {{ using type = std::underlying_type_t<T>; }};

// Whether a field of type T can hold the number, and that. (In float and double it is rounded.)
template <class T>
bool convert([[maybe_unused]] const Number& n, T& out) {{
  using U = typename UnderlyingOf<T>::type;
  if constexpr (std::is_integral_v<U>) {{
    using Limits = std::numeric_limits<U>;
    if (n.sign > 0) {{
      out = static_cast<T>(static_cast<U>(n.magnitude));
      return n.magnitude <= static_cast<unsigned long long>(Limits::max());
    }}
    if (n.sign < 0) {{
      if constexpr (std::is_signed_v<U>) {{
        out = static_cast<T>(static_cast<U>(-1 - static_cast<long long>(n.magnitude - 1)));
        return n.magnitude - 1 <= static_cast<unsigned long long>(Limits::max());
      }}
      return false;
    }}
    const double x = n.real;
    if (!(x >= static_cast<double>(Limits::min()) && x < static_cast<double>(Limits::max()) + 1.0 &&
          x == __builtin_trunc(x))) {{
      return false;
    }}
    out = static_cast<T>(static_cast<U>(x));
    return true;
  }} else {{
    out = static_cast<T>(n.real);
    if constexpr (std::is_floating_point_v<U>) {{
      return __builtin_isfinite(out) && (out != 0 || n.real == 0);
    }}
    return true;
  }}
}}

{fields}
// Fields from numbers, the rest by their defaults. Returns the number of a field that cannot hold its value,
// or -1.
template <class P>
int bind([[maybe_unused]] const Number* values, void* policy) {{
  P made{{}};
  [[maybe_unused]] auto* const bytes = static_cast<unsigned char*>(policy);
{assign}
  __builtin_memcpy(policy, &made, sizeof made);
{copy}
  return -1;
}}

// Whether fields that are not given have defaults.
{defaults}
}}  // namespace

COLDROW_EXPORT const int coldrow_policy_size = sizeof(Policy);
COLDROW_EXPORT int coldrow_bind(const Number* values, void* policy) {{
  return bind<Policy>(values, policy);
}}
COLDROW_EXPORT const {functions} coldrow_functions = {functions}::of<Policy>();
{exports}"""

_FIELD = """\
template <class P>
concept Has_{f} = requires(P p) {{ p.{f}; }} && (!requires {{ &P::{f}; }} || requires {{
  requires std::is_member_object_pointer_v<decltype(&P::{f})>;
}});
static_assert(Has_{f}<Policy>, "{name} has no field '{f}'");
template <class P>
struct TypeOf_{f} {{ using type = std::remove_cv_t<decltype(P::{f})>; }};
template <class T>
concept Number_{f} = requires(double x, T y) {{ y = static_cast<T>(x); }};
static_assert(Number_{f}<TypeOf_{f}<Policy>::type>,
              "{name}: field '{f}' cannot be given: it is no number");
"""

_ASSIGN = """\
  typename TypeOf_{f}<P>::type value_{i}{{}};
  if (!convert(values[{i}], value_{i})) return {i};
  if constexpr (requires {{ made.{f} = value_{i}; }}) {{
    made.{f} = value_{i};
    if (!(made.{f} == value_{i})) return {i};  // of fewer bits
  }}
"""

_COPY = """\
  if constexpr (!requires {{ made.{f} = value_{i}; }}) {{  // a const one
    const auto* const begin = reinterpret_cast<const unsigned char*>(&made);
    const auto* const field = reinterpret_cast<const unsigned char*>(&made.{f});
    __builtin_memcpy(bytes + (field - begin), &value_{i}, sizeof value_{i});
  }}
"""

# g++ warns of every field without a default that an initialiser leaves out; those given are taken away
# (compiler.py). clang++ does not, and says of a constant whether all of it has a value; where defaults
# are no constants it cannot tell.
_DEFAULTS = """\
#if defined(__clang__)
template <class P>
constexpr bool defaults_are_constant() {{
  [[maybe_unused]] P made;
  return true;
}}
template <class P>
constexpr bool all_given() {{
  P made;
{assigned}
  [[maybe_unused]] const P copy = made;
  return true;
}}
template <class P>
constexpr bool check() {{
  static_assert(!std::is_aggregate_v<P> || std::is_default_constructible_v<P>,
                "{name}: has a const field without a default, which clang++ cannot tell from one that is given; "
                "accepted: fields that are not const, or another compiler");
  if constexpr (requires {{ requires std::is_aggregate_v<P>;
                           typename std::bool_constant<defaults_are_constant<P>()>; }}) {{
    static_assert(all_given<P>(), "{name}: a field has no default and was not given");
  }}
  return true;
}}
static_assert(check<Policy>());
#else
template <class P>
void check() {{
  if constexpr (requires {{ P{{.{first} = {{}}}}; }}) {{
    [[maybe_unused]] P made{{.{first} = {{}}}};
  }}
}}
template void check<Policy>();
#endif
"""

_NO_FIELDS = """\
[[maybe_unused]] const Policy made;  // a const object says whether all fields have a default
"""

_DECAY_CHECK = (
    'static_assert(coldrow::DecayPolicy<Policy>, "{name}: a decay is a trivially copyable struct '
    'with float operator()(std::int32_t gap, float lr) const");'
)
_OPTIMIZER_CHECK = (
    'static_assert(coldrow::OptimizerPolicy<Policy>, "{name}: an optimizer is a trivially copyable '
    "struct with scalar_states, vector_states, row() and element(), see "
    'coldrow/policy/optimizer.hpp");\n'
    "static_assert(Policy::scalar_states >= 0 && Policy::vector_states >= 0,\n"
    '              "{name}: scalar_states and vector_states are counts, 0 to 4 each");'
)
_STATES = """\
COLDROW_EXPORT const int coldrow_states = Policy::scalar_states + Policy::vector_states;
COLDROW_EXPORT const char* coldrow_state_name(int i) { return coldrow_functions.state_names[i]; }
"""

_KINDS = {
    "decay": ("coldrow/policy/any_decay.hpp", "coldrow::ExternalDecay", _DECAY_CHECK, ""),
    "optimizer": (
        "coldrow/host/rows.hpp",
        "coldrow::host::OptimizerKernels",
        _OPTIMIZER_CHECK,
        _STATES,
    ),
}


def wrapped(kind: str, name: str, file: str, fields: Sequence[str]) -> str:
    """Return the C++ around a struct.

    Args:
        kind: "decay" or "optimizer".
        name: the struct.
        file: what defines it.
        fields: those that are given, in the order in which their values will be.
    """
    header, functions, check, exports = _KINDS[kind]
    defaults = _NO_FIELDS
    if fields:
        assigned = "\n".join(f"  if constexpr (requires {{ made.{f} = {{}}; }}) made.{f} = {{}};" for f in fields)  # fmt: skip
        defaults = _DEFAULTS.format(name=name, first=fields[0], assigned=assigned)
    return _WRAPPER.format(
        header=header,
        file=file,
        name=name,
        checks=check.format(name=name),
        fields="".join(_FIELD.format(f=f, name=name) for f in fields),
        assign="".join(_ASSIGN.format(f=f, i=i) for i, f in enumerate(fields)),
        copy="".join(_COPY.format(f=f, i=i) for i, f in enumerate(fields)),
        defaults=defaults,
        functions=functions,
        exports=exports,
    )
