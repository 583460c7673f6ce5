"""Start of training on Ray: where it starts, and stop requests that no worker reads."""

from __future__ import annotations

import threading
from importlib import import_module

import pytest

from advtrain.runs.folder import RunFolder
from advtrain.training import Outcome, launch
from tests.kit import digits_data, digits_recipe


@pytest.mark.parametrize("stream", [False, True])
def test_launch_starts_ray_in_the_calling_thread_for_streamed_data(tmp_path, monkeypatch, stream):
    """Ray's processes end with the thread that starts them, and the evaluation needs them after the training."""
    recipe = digits_recipe(f"data.stream={str(stream).lower()}")
    run = RunFolder.create(tmp_path, recipe.name, recipe.digest(), recipe.to_yaml(), {"status": "running"})
    started = []
    module = import_module("advtrain.training.launch")  # the package has a function of this name
    monkeypatch.setattr(module, "start_ray", lambda at: started.append((at, threading.current_thread())))
    monkeypatch.setattr(module, "run_worker", lambda *_: Outcome("finished"))
    assert launch(recipe, digits_data(), run, address="host:1").status == "finished"
    assert started == ([("host:1", threading.main_thread())] if stream else [])


@pytest.mark.parametrize("has_started", [False, True])
def test_launch_is_interrupted_if_no_worker_group_has_started(tmp_path, monkeypatch, has_started):
    recipe = digits_recipe("training.num_workers=2")
    run = RunFolder.create(tmp_path, recipe.name, recipe.digest(), recipe.to_yaml(), {"status": "running"})
    run.append_attempt({"nodes": []})  # of an earlier command
    ended, ticks = threading.Event(), []

    def wait(*_: object) -> Outcome:
        if has_started:
            run.append_attempt({"nodes": []})
        ended.wait(10)
        return Outcome("stopped")

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            run.request_stop()
        if len(ticks) == 4:
            ended.set()

    module = import_module("advtrain.training.launch")  # the package has a function of this name
    monkeypatch.setattr(module, "start_ray", lambda address: None)
    monkeypatch.setattr("advtrain.training.on_ray.train_on_ray", wait)
    try:
        if has_started:
            assert launch(recipe, digits_data(recipe), run, tick=tick, interval_s=0.05).status == "stopped"
        else:
            with pytest.raises(KeyboardInterrupt):
                launch(recipe, digits_data(recipe), run, tick=tick, interval_s=0.05)
    finally:
        ended.set()
