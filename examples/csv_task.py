# %% [markdown]
"""Fine-tune on data of your own: a CSV file, and a YAML file that says how its rows are asked. No code for the task.

The same YAML works on the command line: `l2l fine-tune --task runs/examples/csv_task/moods.yaml --out ...`.
`docs/your-task.md` has all fields.
"""

# %%
import csv
from pathlib import Path

import l2l

FOLDER = Path("runs/examples/csv_task")

SAD = [
    "lost her ball",
    "cried all day",
    "fell and hurt his leg",
    "broke the new toy",
    "was left at home",
    "had no friends",
]
HAPPY = ["found a big box", "won the race", "got a new toy", "made a cake", "played with the dog", "went to the park"]
NAMES = ["lily", "tom", "ben", "mia", "sam", "anna", "max", "sue"]

# %%
# prompt = doc_to_text; the options are scored by their log-probability after it; doc_to_target says which one is right.
TASK = """\
task: moods
data_files: moods.csv
output_type: multiple_choice
doc_to_text: "{{ text }} the day was"
doc_to_choice: [bad, good]
doc_to_target: "{{ 'good' if mood == 'happy' else 'bad' }}"
metadata: {version: 1}
"""

# %%
FOLDER.mkdir(parents=True, exist_ok=True)
with (FOLDER / "moods.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["text", "mood"])
    for name in NAMES:
        for sad, happy in zip(SAD, HAPPY, strict=True):  # 96 rows; one in five is held out for testing, always the same
            writer.writerow([f"{name} {sad} .", "sad"])
            writer.writerow([f"{name} {happy} .", "happy"])
(FOLDER / "moods.yaml").write_text(TASK)

# %%
result = l2l.fine_tune(
    "l2l/tiny",
    task=str(FOLDER / "moods.yaml"),
    method="mezo",
    lr="auto",  # the step size comes from the curvature along the directions: nothing to tune
    steps=60,
    dev_size=16,
    eval_every=60,
    out=str(FOLDER / "run"),
    overwrite=True,
    progress=False,
)
summary = result.summary
print(f"rows: {summary['rows']}")
print(f"train loss: {summary['initial_loss']:.3f} before, {summary['final_loss']:.3f} after")
print(f"test accuracy: {summary['accuracy']:.2f}")
print(f"left in {result.out}: {', '.join(sorted(path.name for path in result.out.iterdir()))}")
