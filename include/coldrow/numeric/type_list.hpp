// Lists of types: what is built in stands in one of them (StoredTypes, BuiltinOptimizers, BuiltinDecays,
// BuiltinRoundings), and everything that depends on what there is follows from the list. A type's
// number is its place in the list, from 0 on.
#pragma once

#include "../platform.hpp"

COLDROW_BEGIN

// Stands for a type where a function is called with one: f(Type<half>{}).
template <class T>
struct Type {
  using type = T;
};

template <int Number, class First, class... Rest>
struct TypeAt : TypeAt<Number - 1, Rest...> {};
template <class First, class... Rest>
struct TypeAt<0, First, Rest...> : Type<First> {};

template <class... T>
struct TypeList {
  static constexpr int size = sizeof...(T);

  template <class U>
  static constexpr bool has = (std::same_as<U, T> || ...);

  // The number of U, or -1.
  template <class U>
  static constexpr int number = [] {
    int at = -1, i = 0;
    ((at = std::same_as<U, T> ? i : at, ++i), ...);
    return at;
  }();

  template <int Number>
  using At = typename TypeAt<Number, T...>::type;

  // The bytes of the largest.
  static constexpr std::size_t bytes = [] {
    std::size_t most = 1;
    ((most = sizeof(T) > most ? sizeof(T) : most), ...);
    return most;
  }();

  // Calls f(Type<T>{}) for each type, in order.
  template <class F>
  static constexpr void for_each(const F& f) {
    (f(Type<T>{}), ...);
  }
};

// Calls f(Type<T>{}) with the type of that number, on the host. (The last one where there is none.)
template <class List, int From = 0, class F>
COLDROW_HOST_INLINE auto with_type_at(int number, const F& f) {
  if constexpr (From + 1 < List::size) {
    if (number != From) return with_type_at<List, From + 1>(number, f);
  }
  return f(Type<typename List::template At<From>>{});
}

COLDROW_END
