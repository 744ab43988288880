// Built-in policies by name, as a program that chooses them at run time has them: a name, and values of
// fields by name. The lists stand where the policies do: BuiltinOptimizers (optimizer.hpp), BuiltinDecays
// (decay.hpp), BuiltinRoundings (rounding.hpp). A policy's number is its place in the list.
#pragma once

#include "decay.hpp"
#include "optimizer.hpp"
#include "rounding.hpp"

COLDROW_BEGIN

// Text is compared without the standard library: this is compiled once per instruction set.
constexpr bool same_text(const char* a, const char* b) {
  for (; *a != '\0' && *a == *b; ++a) ++b;
  return *a == *b;
}

// Takes any field.
struct AnyField {
  template <class T>
  constexpr void operator()(const char*, T&) const {}
};

// (Compilers quote the line that is not satisfied, its comment included.)
template <class P>
concept BuiltinPolicy = std::is_trivially_copyable_v<P> && requires(P p) {
  { P::name } -> std::convertible_to<const char*>;  // needed: static constexpr const char* name
  P::fields(p, AnyField{});  // needed: static fields(self, f), calls f("field", self.field)
  P{};                       // needed: a default for each field
};

// Whether all types of a list are such policies, of different names.
template <class... P>
constexpr bool are_builtin(TypeList<P...>) {
  static_assert((BuiltinPolicy<P> && ...), "a built-in policy has a name, and its fields by name");
  const char* const names[] = {P::name...};
  for (int i = 0; i < TypeList<P...>::size; ++i) {
    for (int j = 0; j < i; ++j) {
      if (same_text(names[i], names[j])) return false;
    }
  }
  return true;
}
static_assert(are_builtin(BuiltinOptimizers{}), "two built-in optimizers have one name");
static_assert(are_builtin(BuiltinDecays{}), "two built-in decays have one name");
static_assert(are_builtin(BuiltinRoundings{}), "two built-in roundings have one name");

// The number of the policy of that name in the list, or -1.
template <class List>
int policy_number(const char* name) {
  int found = -1, number = 0;
  List::for_each([&](auto one) {
    if (same_text(decltype(one)::type::name, name)) found = number;
    ++number;
  });
  return found;
}

// Sets the field of that name; false where there is none. (A float is rounded.)
template <class Policy, class Value>
bool set_field(Policy& policy, const char* field, Value value) {
  bool found = false;
  Policy::fields(policy, [&]<class T>(const char* name, T& own) {
    if (!same_text(name, field)) return;
    own = static_cast<T>(value);
    found = true;
  });
  return found;
}

// A decay that reads its factors from a table, which whoever runs it makes (CumulativeLinear).
template <class D>
concept DecayByTable = DecayPolicy<D> && requires(D d, float* out) {
  { D::table_size(d.alpha) } -> std::same_as<std::int32_t>;
  D::fill_table(d.alpha, out);
  d.table = out;
  d.size = 0;
};

COLDROW_END
