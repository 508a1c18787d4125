"""Breaks runs and their input on purpose. `python -m pytest tests/faults --full` does it as often as docs/reliability.md says."""
