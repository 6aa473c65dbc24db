"""Compiler options of programs that run once."""

QUICK = {"xla_backend_optimization_level": 0}
"""Most of the time goes into LLVM. What XLA makes of a program is the same without its optimisations."""
