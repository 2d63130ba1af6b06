"""What front and engine say to each other survives the pipe."""

import pickle

from sampler_service.jobs import SamplePart, StopReason, WaitedTooLong


def test_a_part_crosses_the_pipe_whole() -> None:
    for reason in (None, StopReason.STOP):
        part = SamplePart(3, (7, 8), (-0.5, -1.5), (-0.25, -2.0), reason)
        assert pickle.loads(pickle.dumps(part)) == part


def test_a_refusal_for_waiting_says_how_long_and_which_option() -> None:
    error = pickle.loads(pickle.dumps(WaitedTooLong(30.04)))
    assert error.reason == "WAITED_TOO_LONG"
    assert error.metadata == {"waited_s": "30.0"}
    assert error.retry_after_s is None
    assert "30.0 s" in error.message
    assert "--max-wait-s" in error.message
