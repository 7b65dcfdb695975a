"""From data on disk to token ids: records, their layouts, prompt templates, and the examples of a run.

Nothing in this package imports anything else of this repository.
"""
