"""Hostile input for every reader: `make fuzz`, or `PYTHONPATH=tests python -m fuzz`."""
