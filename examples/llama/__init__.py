"""A small Llama runtime over cupy_paged: what `examples/generate.py` is made of."""
