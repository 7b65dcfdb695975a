"""What people see of a run: the terminal's text, the report page, figures, model cards, and the loggers of --log.

The package imports `evaluate`, for its table of columns, and nothing else of this repository. Its observers are told of
a run's events (runtime/run.py); all else is read from the files of the run's folder.
"""
