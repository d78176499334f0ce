"""Hostile input for every reader: `make fuzz`, or `python -m fuzz` from the tests' folder."""
