"""Deliberate faults, and the runner that checks that tests notice them: `python -m tests.mutants`.

A mutant is one change of one source text. Nothing on disk changes: a process that runs tests with
`CUPY_PAGED_TEST_MUTANT` set imports and compiles the changed text (see `apply`).
"""
