"""Tasks on data sets of the hub. A module here defines ``TASK``, or ``TASKS``; adding a task is adding a module."""
