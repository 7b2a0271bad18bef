"""`step3vl eval CKPT --harness lmms --tasks mmstar,...`: lmms-eval's own prompts and scorers on copies of its data.

lmms-eval loads datasets from the hub. For each task a file is written that includes the task's own and points it to the
copy in the data folder; the rest is lmms-eval.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALL = (
    "pip install --no-deps lmms-eval && pip install --no-deps loguru sacrebleu portalocker tabulate colorama lxml "
    "evaluate pytz tenacity && pip install datasets accelerate sqlitedict"
)
"""lmms-eval declares torchvision, opencv and many models' packages, which ours and most tasks do not need."""


def evaluate_with_lmms(
    checkpoint: Path,
    tasks: Sequence[str],
    data_root: Path,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """lmms-eval's result dictionary, with `results` by task.

    Raises:
        ValueError: lmms-eval is not installed, a task is not known, or its data are not in the folder.
    """
    if find_spec("lmms_eval") is None:
        raise ValueError(f"lmms-eval is not installed: {INSTALL}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        names = [write_task(task, data_root, Path(folder)) for task in tasks]
        manager = TaskManager(include_path=[folder], include_defaults=False)
        arguments = {"pretrained": str(checkpoint), "max_new_tokens": max_new_tokens}
        found = simple_evaluate(
            model="step3vl",
            model_args=",".join(f"{key}={value}" for key, value in arguments.items() if value is not None),
            tasks=names,
            batch_size=batch_size,
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
    if found is None:
        raise ValueError("lmms-eval gave no result")
    return found


def write_task(task: str, data_root: Path, folder: Path) -> str:
    """Write the file of a task that reads local parquet files; returns the task's name in it."""
    import lmms_eval.tasks
    import yaml

    root = Path(lmms_eval.tasks.__file__).parent
    files = [path for path in root.rglob("*.yaml") if _is_task(path, task)]
    if not files:
        raise ValueError(f"lmms-eval has no task {task!r}")
    dataset, split = _dataset(files[0])
    copies = [data_root / dataset, data_root / dataset.rpartition("/")[2]]
    copy = next((place for place in copies if place.is_dir()), None)
    if copy is None:
        raise ValueError(f"task {task}: there is no {copies[0]} and no {copies[1]}; copy the dataset {dataset} there")
    found = sorted(str(path.resolve()) for path in copy.rglob("*.parquet") if split in path.name)
    if not found:
        raise ValueError(f"task {task}: {copy} has no parquet file of split {split!r}")
    local = f"{task}_local"
    content: dict[str, Any] = {"include": str(files[0]), "task": local, "dataset_path": "parquet", "dataset_name": None}
    content["dataset_kwargs"] = {"data_files": {split: found}}
    (folder / f"{local}.yaml").write_text(yaml.safe_dump(content))
    return local


def _is_task(path: Path, task: str) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines()
    return any(line.replace('"', "").replace("'", "").split("#")[0].strip() == f"task: {task}" for line in lines)


def _dataset(path: Path) -> tuple[str, str]:
    """(dataset, split) of a task, looked for in the files that it includes, too."""
    values: dict[str, str] = {}
    while path.is_file():
        include = None
        for line in path.read_text(encoding="utf-8").splitlines():
            key, colon, value = line.partition(":")
            value = value.split("#")[0].strip().strip("\"'")
            if colon and key in ("dataset_path", "test_split", "validation_split"):
                values.setdefault("split" if key.endswith("split") else key, value)
            elif key == "include":
                include = value
        if include is None:
            break
        path = path.parent / include
    if "dataset_path" not in values or "split" not in values:
        raise ValueError(f"{path}: no dataset_path or no split is named")
    return values["dataset_path"], values["split"]
