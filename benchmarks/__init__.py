"""How fast cupy_paged is, against the memory's own speed and against other libraries.

`python -m benchmarks run` from the checkout measures; CONTRIBUTING.md says more.
"""
