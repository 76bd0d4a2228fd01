"""Ways into other programs and frameworks, each of them optional, and imported by its own name."""
