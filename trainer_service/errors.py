"""What the trainer refuses, each with a reason of its own. Errors of its engine too: they cross the
pipe, and in the front there is no torch.
"""

import errno
from collections.abc import Sequence
from pathlib import Path

from mint_core import errors

RETRY_AFTER_S = 1.0


class SequenceGap(errors.Aborted):
    """The call came before an earlier one, which did not come in time. Send both again."""

    reason = "SEQUENCE_GAP"

    def __init__(self, sequence: int, missing_sequence: int) -> None:
        super().__init__(
            f"`sequence` {sequence} waits for {missing_sequence}, which has not arrived; "
            f"send {missing_sequence} and then this call again",
            sequence=sequence,
            missing_sequence=missing_sequence,
        )


class WriterFenced(errors.Aborted):
    """Another client has opened the run. Final."""

    reason = "WRITER_FENCED"

    def __init__(self, writer_epoch: int, current: int) -> None:
        super().__init__(
            f"`writer_epoch` {writer_epoch} has ended because the run was opened again (now "
            f"{current}); "
            "open the run to take it over",
            writer_epoch=writer_epoch,
            current_writer_epoch=current,
        )


class SequenceReused(errors.AlreadyExists):
    """The number belongs to another call."""

    reason = "SEQUENCE_REUSED"

    def __init__(self, sequence: int) -> None:
        super().__init__(
            f"`sequence` {sequence} was used for a call with another content; "
            "OpenTrainingRun tells the next free number",
            sequence=sequence,
        )


class RequestIdReused(errors.AlreadyExists):
    """The id belongs to another request."""

    reason = "REQUEST_ID_REUSED"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"`request_id` {request_id!r} was used for another request within 24 hours; choose a "
            "new one",
            request_id=request_id,
        )


class AnswerAcknowledged(errors.FailedPrecondition):
    """The answer may be gone, since the caller said that it has it."""

    reason = "ANSWER_ACKNOWLEDGED"

    def __init__(self, sequence: int, acknowledged_sequence: int) -> None:
        super().__init__(
            f"`sequence` {sequence} was acknowledged (all up to {acknowledged_sequence} were), "
            "so its answer is no longer kept; acknowledge only answers that have arrived",
            sequence=sequence,
            acknowledged_sequence=acknowledged_sequence,
        )


class AnswerDropped(errors.FailedPrecondition):
    """The run kept as many answers as it may, and this one was told long ago."""

    reason = "ANSWER_DROPPED"

    def __init__(self, sequence: int, dropped_sequence: int) -> None:
        super().__init__(
            f"the answer of `sequence` {sequence} was sent and is no longer kept, nor is any up to "
            f"{dropped_sequence}: the run keeps only so many that are not acknowledged; raise "
            "`acknowledged_sequence` as answers arrive",
            sequence=sequence,
            dropped_sequence=dropped_sequence,
        )


class AnswersUnacknowledged(errors.ResourceExhausted):
    """The run keeps as many answers as it may."""

    reason = "ANSWERS_UNACKNOWLEDGED"

    def __init__(self, count: int, size_bytes: int) -> None:
        super().__init__(
            f"{count} answers of {size_bytes} bytes are not acknowledged; "
            "raise `acknowledged_sequence` to the last answer that has arrived",
            retry_after_s=RETRY_AFTER_S,
            count=count,
            size_bytes=size_bytes,
        )


class EventsGone(errors.FailedPrecondition):
    """A watch cannot go on where it was."""

    reason = "EVENTS_GONE"

    def __init__(self, resume_after: int) -> None:
        super().__init__(
            f"what came behind event {resume_after} of the run is not held, or not all of it; "
            "watch from now on: leave `resume_after` out",
            resume_after=resume_after,
        )


class TooManyCallsInFlight(errors.ResourceExhausted):
    """The run's queue is full."""

    reason = "TOO_MANY_CALLS_IN_FLIGHT"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the run has {limit} unanswered calls, the most that are held; wait for an answer "
            "first",
            retry_after_s=RETRY_AFTER_S,
            limit=limit,
        )


class QueueFull(errors.ResourceExhausted):
    """As much of the tenant's, or of the run's, waits as may."""

    reason = "QUEUE_FULL"

    def __init__(
        self, *, calls: int, tokens: int, max_calls: int, max_tokens: int, retry_after_s: float
    ) -> None:
        super().__init__(
            f"{calls} calls with {tokens} tokens wait for their answers, and new ones are taken "
            f"below {max_calls} calls and {max_tokens} tokens; this one has used up nothing: send "
            f"it again in {retry_after_s:.1f} s",
            retry_after_s=retry_after_s,
            calls=calls,
            tokens=tokens,
            max_calls=max_calls,
            max_tokens=max_tokens,
        )


class EarlyArrivalsFull(errors.ResourceExhausted):
    """The tenant's calls that came before their turn hold as much as they may."""

    reason = "QUEUE_FULL"

    def __init__(self, held_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"calls of yours that came before an earlier one hold {held_bytes >> 20} MiB, of "
            f"{max_bytes >> 20} that they may; this one has used up nothing: send it again",
            retry_after_s=RETRY_AFTER_S,
            held_bytes=held_bytes,
            max_bytes=max_bytes,
        )


class GradientIncomplete(errors.FailedPrecondition):
    """A backward that belongs to the step failed."""

    reason = "GRADIENT_INCOMPLETE"

    def __init__(self, failed_sequence: int) -> None:
        super().__init__(
            f"ForwardBackward with `sequence` {failed_sequence} failed, so the gradient is "
            "incomplete: "
            "no step was taken and the gradient is cleared; run the batch again",
            failed_sequence=failed_sequence,
        )


class BackwardCountMismatch(errors.FailedPrecondition):
    """The program asked for another number of backwards than arrived."""

    reason = "BACKWARD_COUNT_MISMATCH"

    def __init__(self, asked: int, arrived: int) -> None:
        super().__init__(
            f"`backward_count` is {asked} but {arrived} backwards arrived since the last step: "
            "no step was taken and the gradient is cleared; run the batch again",
            backward_count=asked,
            arrived=arrived,
        )


class LossNotFinite(errors.FailedPrecondition):
    """What the arithmetic of a forward or backward came to."""

    reason = "LOSS_NOT_FINITE"

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is not finite (NaN, Inf, or too large for float32), so nothing of this call "
            "counts; check advantages, weights and logprobs of the data and the adapter's alpha, "
            "or load an earlier state and lower the learning rate",
            what=what,
        )


class NonFiniteGradient(errors.FailedPrecondition):
    """No step is taken on NaN."""

    reason = "GRADIENT_NOT_FINITE"

    def __init__(self) -> None:
        super().__init__(
            "the norm of the gradient is not finite (NaN, Inf, or too large for float32): it was "
            "cleared and no step was taken; lower the learning rate or check the data"
        )


class NonFiniteStep(errors.FailedPrecondition):
    """No step is taken that leaves NaN."""

    reason = "STEP_NOT_FINITE"

    def __init__(self, learning_rate: float, eps: float, weight_decay: float) -> None:
        super().__init__(
            "the step would have left NaN, or what is too large for float32, in weights or "
            f"moments (`learning_rate` {learning_rate:g}, `eps` {eps:g}, `weight_decay` "
            f"{weight_decay:g}): it was not taken, and the gradient is cleared; lower the "
            "learning rate, or give a usual `eps` such as 1e-8",
            learning_rate=learning_rate,
            eps=eps,
            weight_decay=weight_decay,
        )


class NonFiniteExport(errors.FailedPrecondition):
    """Rounding to a shorter type made Inf, or the model holds it anyway."""

    reason = "EXPORT_NOT_FINITE"

    def __init__(self, names: Sequence[str], dtype: str) -> None:
        remedy = "an earlier checkpoint: the base model or this one has it in float32 too"
        if dtype == "float16":
            remedy = "`dtype` bfloat16 or float32, which hold what is beyond 65,504"
        super().__init__(
            f"{len(names)} tensors of the merged model, the first `{names[0]}`, would hold NaN or "
            f"Inf in {dtype}; export {remedy}",
            tensor=names[0],
            count=len(names),
            dtype=dtype,
        )


class RowStorageFull(errors.ResourceExhausted):
    """There is no room for one more row, neither in memory nor on disk."""

    reason = "ROW_STORAGE_FULL"


class NoGradient(errors.FailedPrecondition):
    """There is nothing to step on."""

    reason = "NO_GRADIENT"

    def __init__(self) -> None:
        super().__init__(
            "there is no gradient, so no step was taken; call ForwardBackward before OptimStep"
        )


class TrainingRunExpired(errors.NotFound):
    """Nobody called the run for its retention time."""

    reason = "TRAINING_RUN_NOT_FOUND"

    def __init__(self, training_run_id: str, retention_s: float) -> None:
        super().__init__(
            f"training run `{training_run_id}` was deleted because nobody called it for its "
            f"retention time of {retention_s:g} s; its named checkpoints are still there",
            training_run_id=training_run_id,
        )


class TrainingRunLost(errors.FailedPrecondition):
    """The run's weights cannot be restored from the server's state."""

    reason = "TRAINING_RUN_LOST"

    def __init__(self, training_run_id: str, why: str) -> None:
        super().__init__(
            f"the weights of training run `{training_run_id}` cannot be restored ({why}); restore "
            "the server's state from a backup, or create a run from the last checkpoint of this "
            "one",
            training_run_id=training_run_id,
        )
        self.why = why


class StateDamaged(TrainingRunLost):
    """What the server's state lacks or has wrong of a run."""


class RequestDamaged(errors.FailedPrecondition):
    """What was accepted, and not executed yet, is not as it was sent."""

    reason = "REQUEST_DAMAGED"

    def __init__(self, training_run_id: str, sequence: int) -> None:
        super().__init__(
            f"what call `sequence` {sequence} asked for was damaged in the server's state before "
            "it was executed: nothing was done, and the number is used up; send it as a new call",
            training_run_id=training_run_id,
            sequence=sequence,
        )


class TrainingRunUploaded(errors.FailedPrecondition):
    """The run holds uploaded checkpoints, and nothing that could be trained."""

    reason = "TRAINING_RUN_UPLOADED"

    def __init__(self, training_run_id: str) -> None:
        super().__init__(
            f"training run `{training_run_id}` holds uploaded checkpoints and takes no calls; "
            "create a run from one of them or load it into one, and change what is to be changed "
            "of the checkpoints themselves",
            training_run_id=training_run_id,
        )


class CheckpointMismatch(errors.FailedPrecondition):
    """The checkpoint belongs to another base model or shape of adapter."""

    reason = "CHECKPOINT_MISMATCH"


class RowNotSaved(errors.ResourceExhausted):
    """The disk did not take a saved row; the one before it is as good as ever."""

    reason = "SNAPSHOT_FAILED"

    def __init__(self, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        super().__init__(
            f"a row could not be written: {error.strerror}",
            retry_after_s=RETRY_AFTER_S if full else None,
        )


class RowNotWritten(errors.ResourceExhausted):
    """The weights could not be put where they can be published from."""

    reason = "ROW_NOT_WRITTEN"

    def __init__(self, path: str, folder: Path, error: OSError) -> None:
        super().__init__(
            f"the weights for `{path}` cannot be written to {folder}: {error.strerror}; free space "
            "there, then save again",
            path=path,
        )
