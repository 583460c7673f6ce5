"""Parts of a batch, a core for each."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from advtrain.cores import NUMBERS, ROWS, Ahead, cut, one_core, side_by_side


def test_a_batch_is_cut_into_a_part_for_each_core_if_it_is_large_enough():
    x = torch.empty(4 * ROWS + 1, NUMBERS // ROWS)
    assert cut(x, 1) == [slice(0, len(x))]
    parts = cut(x, 4)
    assert [part.stop - part.start for part in parts] == [ROWS, ROWS, ROWS, ROWS + 1]
    assert torch.equal(torch.cat([torch.arange(len(x))[part] for part in parts]), torch.arange(len(x)))
    assert cut(x[:-2], 4) == [slice(0, len(x) - 2)]  # too few rows
    assert cut(x[:-1, 1:], 4) == [slice(0, len(x) - 1)]  # too few numbers


def test_parts_run_at_the_same_time_on_one_core_each_and_come_back_in_order():
    together = threading.Barrier(3, timeout=10)

    def part(number):
        together.wait()
        return number, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    before = torch.get_num_threads()
    assert side_by_side(part, [5, 6, 7]) == [(5, 1, True), (6, 1, False), (7, 1, False)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_a_part_comes_when_no_part_runs_any_more(failing):
    ended = []

    def part(number):
        if number == failing:
            raise ValueError(f"part {number}")
        time.sleep(0.2)
        ended.append(number)

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=f"part {failing}"):
        side_by_side(part, [0, 1])
    assert ended == [1 - failing]
    assert torch.get_num_threads() == before


def test_one_core_is_given_back_also_after_an_error():
    def fail():
        with one_core():
            raise ValueError(f"on {torch.get_num_threads()}")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="on 1"):
        fail()
    assert torch.get_num_threads() == before


def test_a_part_may_have_parts_of_its_own():
    def outer(number):
        return side_by_side(lambda inner: (number, inner, torch.get_num_threads()), [1, 2])

    assert side_by_side(outer, [3, 4]) == [[(3, 1, 1), (3, 2, 1)], [(4, 1, 1), (4, 2, 1)]]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_parts_run_in_a_forked_process_too_and_it_does_not_wait_for_what_its_parent_has_begun():
    ahead, go_on = Ahead(2), threading.Event()
    side_by_side(abs, [1, 2])
    ahead.plan(1, go_on.wait)
    ahead.begin()
    child = os.fork()
    if not child:
        right = side_by_side(abs, [-1, -2]) == [1, 2] and ahead.take(1, lambda: "here") == "here"
        os._exit(7 if right else 1)
    go_on.set()
    deadline = time.monotonic() + 30
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("parts of a forked process never ended")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 7


def test_what_is_planned_is_made_on_another_core_behind_its_parts_and_anything_else_when_it_is_asked_for():
    ahead, order = Ahead(2), []

    def part(number):
        if number == 1:
            ahead.begin()
        else:
            time.sleep(0.1)
            order.append(number)

    def here():
        return "here"

    assert ahead.take(1, here) == "here"
    ahead.plan(2, lambda: order.append("ahead") or threading.current_thread().name)
    side_by_side(part, [1, 2])
    assert ahead.take(2, here).startswith("part")
    assert order == [2, "ahead"]
    assert ahead.take(2, here) == "here"  # once only
    ahead.plan(3, lambda: "not begun")
    assert ahead.take(3, here) == "here"
    ahead.plan(4, lambda: "begun")
    ahead.begin()
    ahead.begin()
    assert ahead.take(5, here) == "here"  # not the one that is asked for
    assert ahead.take(4, here) == "here"


def test_an_error_of_what_is_planned_comes_when_it_is_asked_for():
    ahead = Ahead(2)
    ahead.plan(1, lambda: 1 // 0)
    ahead.begin()
    with pytest.raises(ZeroDivisionError):
        ahead.take(1, lambda: 1)
