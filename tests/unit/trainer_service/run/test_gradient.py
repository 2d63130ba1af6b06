"""When a step may be taken."""

from mint_core.errors import MintError
from trainer_service.errors import BackwardCountMismatch, GradientIncomplete, NoGradient
from trainer_service.run_description import Gradient


def test_a_step_needs_a_gradient() -> None:
    gradient = Gradient()
    assert isinstance(gradient.refusal(None), NoGradient)
    assert not gradient.pending

    gradient = gradient.with_one_more()

    assert gradient.refusal(None) is None
    assert gradient.refusal(1) is None
    assert gradient.pending


def test_a_failed_backward_refuses_the_step_and_is_named() -> None:
    gradient = Gradient()
    gradient = gradient.with_one_more()
    gradient = gradient.without(7)
    gradient = gradient.without(5)
    gradient = gradient.with_one_more()

    refusal = gradient.refusal(4)

    assert isinstance(refusal, GradientIncomplete)
    assert refusal.metadata == {"failed_sequence": "5"}
    assert gradient.backward_count == 4


def test_a_lone_failed_backward_is_no_gradient_but_named() -> None:
    gradient = Gradient()
    gradient = gradient.without(3)

    assert not gradient.pending
    assert gradient.touched
    assert isinstance(gradient.refusal(None), GradientIncomplete)


def test_a_backward_that_never_arrived_refuses_the_step() -> None:
    gradient = Gradient()
    gradient = gradient.with_one_more()

    refusal = gradient.refusal(2)

    assert isinstance(refusal, BackwardCountMismatch)
    assert refusal.metadata == {"backward_count": "2", "arrived": "1"}
    assert "`backward_count` is 2 but 1 backwards arrived" in refusal.message


def test_a_count_of_backwards_that_all_got_lost_is_a_mismatch() -> None:
    refusal: MintError | None = Gradient().refusal(1)

    assert isinstance(refusal, BackwardCountMismatch)
