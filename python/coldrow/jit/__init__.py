"""Policies of your own, compiled from a few lines of C++ when the program runs.

``decay`` and ``optimizer`` return objects that go wherever a built-in policy goes::

    half_life = coldrow.jit.decay("HalfLife", '''
        struct HalfLife {
          float half_life;
          COLDROW_HD float operator()(std::int32_t gap, float lr) const {
            return float(coldrow::exp2_fixed(-double(gap) / half_life));
          }
        };''', half_life=1000.0)
    update = coldrow.RowUpdate(coldrow.Adam(), coldrow.EpochGated(half_life))

The source is compiled with the system's C++ compiler (the variable CXX, else c++, g++ or clang++) against
the headers of this package, with the flags under which every build gives the same bits, and kept in
``$COLDROW_JIT_CACHE`` (default ``~/.cache/coldrow/jit``). ``COLDROW_JIT=off`` turns compiling off. It is
code: never compile a source you would not run.
"""

from coldrow.jit.compiler import CompileError
from coldrow.jit.policies import JitDecay, JitOptimizer, decay, optimizer

__all__ = ["CompileError", "JitDecay", "JitOptimizer", "decay", "optimizer"]
