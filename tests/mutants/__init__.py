"""Deliberate faults, and the runner that checks that tests notice them: `python -m tests.mutants`.

A mutant is one change of one source text. Nothing on disk changes: the process that
runs its tests imports and compiles the changed text (see `apply`).
"""
