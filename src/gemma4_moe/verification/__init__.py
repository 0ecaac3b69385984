"""The parts of `verify` and `diff`: a reference of their own, and how differences are found and told."""
