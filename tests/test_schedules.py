from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import BudgetError
from secateur.schedules import cubic, linear, one_shot

SPARSITY = st.floats(0, 0.99)


@given(st.sampled_from([one_shot, linear, cubic]), st.integers(1, 60), SPARSITY, SPARSITY)
def test_a_schedule_ascends_from_initial_to_exactly_final(schedule, steps, one, other):
    initial, final = sorted((one, other))
    values = [schedule(step, steps, final, initial) for step in range(steps + 1)]
    assert values[0] == pytest.approx(initial)
    assert values[-1] == final
    assert all(b >= a - 1e-12 for a, b in pairwise(values))


def test_hand_values():
    assert [one_shot(t, 3, 0.6) for t in range(4)] == [0, 0.6, 0.6, 0.6]
    assert [linear(t, 4, 0.6, 0.2) for t in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    # T = 10, w = c = 1: the ramp takes 8 steps from step 1 to step 9
    assert cubic(1, 10, 0.5) == 0
    assert cubic(5, 10, 0.5) == pytest.approx(0.5 * (1 - 0.5**3))
    assert cubic(9, 10, 0.5) == 0.5
    assert cubic(3, 4, 0.8, 0.4, warmup=0.5, cooldown=0) == pytest.approx(0.8 - 0.4 * 0.5**3)


def test_the_ramp_is_steepest_at_its_beginning():
    values = [cubic(t, 20, 0.5) for t in range(2, 19)]
    rises = [b - a for a, b in pairwise(values)]
    assert rises == sorted(rises, reverse=True)


@pytest.mark.parametrize(
    ("step", "steps", "final", "initial", "words"),
    [
        (5, 4, 0.5, 0.0, "step 5 of 4"),
        (-1, 4, 0.5, 0.0, "step -1"),
        (0, 0, 0.5, 0.0, "at least 1"),
        (1, 4, 1.0, 0.0, "from 0.0 to 1.0"),
        (1, 4, 0.2, 0.5, "from 0.5 to 0.2"),
        (1, 4, float("nan"), 0.0, "nan"),
    ],
)
@pytest.mark.parametrize("schedule", [one_shot, linear, cubic])
def test_bad_steps_and_sparsities_are_refused(schedule, step, steps, final, initial, words):
    with pytest.raises(BudgetError, match=words):
        schedule(step, steps, final, initial)


def test_no_time_for_the_ramp():
    with pytest.raises(BudgetError, match=r"warm-up 0\.6 and cool-down 0\.4"):
        cubic(1, 10, 0.5, warmup=0.6, cooldown=0.4)
