"""A small Llama runtime over cupy_paged: what the examples are made of."""
