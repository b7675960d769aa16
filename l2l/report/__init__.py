"""The files of a run: directory, metrics, summary and pictures; and output in the terminal."""
