"""From data on disk to token ids: records, their layouts, prompt templates, and the examples of a run.

Nothing in this package imports anything else of this repository. What cannot be read or used is a ValueError or an
OSError of one line, which names the file and, if it is known, the line, and says what was expected.
"""
