"""Random calls of every operator against the oracle: `python -m tests.fuzz`."""
