"""Trains a tiny model by a ZOTrainer, and writes the losses of its steps and the weights of this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from trainers import Steps, arguments, model, rows

from l2l.integrations import ZOArguments, ZOTrainer

folder, accumulated = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
trained, seen = model(), Steps()
sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulated, "train_sampling_strategy": "sequential"}
saving = {"save_strategy": "steps", "save_steps": 2}
args = arguments(folder / "out", **sizes, **saving)
trainer = ZOTrainer(model=trained, args=args, zo=ZOArguments(), train_dataset=rows(), callbacks=[seen])
trainer.train(resume_from_checkpoint=True if len(sys.argv) > 3 else None)
rank = int(os.environ.get("RANK", "0"))
values = [parameter.detach().reshape(-1).tolist() for parameter in trained.parameters()]
(folder / f"{rank}.json").write_text(json.dumps({"losses": seen.losses, "weights": values}))
