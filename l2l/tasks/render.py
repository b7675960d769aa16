"""From a row to an `Example`, with one clear error where that does not work."""

from __future__ import annotations

from l2l.tasks.base import Example, Row, Task


def render(task: Task, row: Row, where: str) -> Example:
    """Render one row with ``task.example`` and check what came out.

    ``where`` says which row it is (``FILE:LINE`` or a number) and opens the message of every error.

    Raises:
        ValueError: a field is missing or empty, the task cannot render the row, it gives no option or an empty
            one, or the gold index points past the options.
    """
    _check_fields(task, row, where)
    try:
        example = task.example(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: task {task.name!r} cannot render this row: {error}") from error
    _check_example(task, example, where)
    return example


def _check_fields(task: Task, row: Row, where: str) -> None:
    for field in task.fields:
        if field not in row:
            raise ValueError(
                f"{where}: field {field!r} is missing; task {task.name!r} needs {', '.join(task.fields)} "
                f"and the row has {', '.join(map(str, row)) or 'no field'}"
            )
        if row[field] is None:
            raise ValueError(f"{where}: field {field!r} is null; task {task.name!r} needs a value there")


def _check_example(task: Task, example: Example, where: str) -> None:
    if not example.options or not all(example.options):
        raise ValueError(
            f"{where}: task {task.name!r} gives the options {list(example.options)}; each must be non-empty"
        )
    wrong = [index for index in example.gold if not 0 <= index < len(example.options)]
    if wrong or not example.gold:
        raise ValueError(
            f"{where}: task {task.name!r} gives the gold indices {list(example.gold)}; "
            f"they must lie in 0..{len(example.options) - 1}"
        )


def label_index(row: Row, field: str, count: int) -> int:
    """Read a class label: an integer (or a boolean) in ``0..count - 1``.

    Raises:
        ValueError: the field holds anything else. Hidden test labels, stored as -1, are among what is refused.
    """
    value = row[field]
    if not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"field {field!r} must be a whole number in 0..{count - 1}, not {value!r}")
    return int(value)


def text_of(row: Row, field: str) -> str:
    """Read a text field without its outer white space.

    Raises:
        ValueError: the field is not a string.
    """
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string, not {value!r}")
    return value.strip()
