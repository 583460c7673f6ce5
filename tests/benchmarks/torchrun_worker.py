"""One rank of the training under torchrun, the baseline for the overhead of Ray Train.

torchrun --nproc-per-node 2 -m tests.benchmarks.torchrun_worker RUN_FOLDER DATA_ROOT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from advtrain.data import load_data
from advtrain.environment import tune_malloc
from advtrain.recipe import load_recipe
from advtrain.runs.folder import RunFolder
from advtrain.training import Session, run_worker


def main() -> None:
    """Train the recipe of the run folder."""
    run, data_root = RunFolder(Path(sys.argv[1])), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})  # before threads start: they inherit it
    tune_malloc()
    dist.init_process_group("gloo")
    recipe = load_recipe(run.path / "recipe.yaml")
    torch.set_num_threads(recipe.training.cpus_per_worker)
    outcome = run_worker(recipe, load_data(recipe.data, data_root), run, Session(rank, dist.get_world_size()))
    dist.destroy_process_group()
    assert outcome.status == "finished", outcome.message


if __name__ == "__main__":
    main()
