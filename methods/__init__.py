"""The methods beside SPIN, on spin.py's own phases: `python -m methods.family` and `methods.sdft`."""
