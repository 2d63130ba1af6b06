"""Answers about runs: dataclasses in, protobuf out; those of requests that act once as bytes."""

from datetime import UTC, datetime

from mint_core.lora.spec import AdapterSpec
from mintrpc.v1 import trainer_pb2, types_pb2
from trainer_service.run_description import RunView
from trainer_service.uploaded_runs import UploadedRun
from trainer_service.wire.pages import Page


def create_response(view: RunView) -> bytes:
    return trainer_pb2.CreateTrainingRunResponse(
        training_run=run_message(view), writer_epoch=view.state.writer_epoch
    ).SerializeToString()


def open_response(view: RunView, writer_epoch: int) -> bytes:
    return trainer_pb2.OpenTrainingRunResponse(
        training_run=run_message(view),
        writer_epoch=writer_epoch,
        next_sequence=view.next_sequence,
        step=view.state.step,
        gradient_pending=view.state.gradient.pending,
        backward_count=view.state.gradient.backward_count,
    ).SerializeToString()


def update_response(view: RunView) -> bytes:
    return trainer_pb2.UpdateTrainingRunResponse(training_run=run_message(view)).SerializeToString()


def list_response(
    page: Page[RunView | UploadedRun],
) -> trainer_pb2.ListTrainingRunsResponse:
    return trainer_pb2.ListTrainingRunsResponse(
        training_runs=[run_message(run) for run in page.entries],
        next_page_token=page.next_page_token,
        total_size=page.total_size,
    )


def _state_message(view: RunView) -> str:
    if view.lost:
        return f"weights lost: {view.lost}"
    return "; ".join(filter(None, (view.trouble, view.state.inexact_note)))


def run_message(run: RunView | UploadedRun) -> trainer_pb2.TrainingRun:
    return _trained(run) if isinstance(run, RunView) else _uploaded(run)


def _uploaded(run: UploadedRun) -> trainer_pb2.TrainingRun:
    manifest = run.last
    return trainer_pb2.TrainingRun(
        training_run_id=run.training_run_id,
        base_model=manifest.base_model,
        base_fingerprint=manifest.base_fingerprint,
        lora_config=lora_config_message(manifest.spec),
        metadata=manifest.metadata,
        create_time=run.first.create_time,
        update_time=manifest.create_time,
        step=manifest.step,
        state=trainer_pb2.TrainingRun.STATE_ACTIVE,
        trained_modules=manifest.spec.modules,
        kind=trainer_pb2.TrainingRun.KIND_UPLOADED,
    )


def _trained(view: RunView) -> trainer_pb2.TrainingRun:
    origin, state = view.origin, view.state
    states = trainer_pb2.TrainingRun
    return trainer_pb2.TrainingRun(
        training_run_id=origin.training_run_id,
        base_model=origin.base_model,
        base_fingerprint=origin.base_fingerprint,
        lora_config=lora_config_message(origin.spec),
        metadata=view.metadata,
        create_time=origin.create_time,
        update_time=datetime.fromtimestamp(state.update_time_s, UTC),
        step=state.step,
        next_sequence=view.next_sequence,
        gradient_pending=state.gradient.pending,
        state=states.STATE_FAILED if view.lost else states.STATE_ACTIVE,
        state_message=_state_message(view),
        trainable_parameter_count=origin.trainable_parameter_count,
        trained_modules=origin.spec.modules,
        isolated=origin.isolated,
        inexact_replay_count=state.inexact_replays,
        kind=states.KIND_TRAINED,
        group=view.group,
    )


def lora_config_message(spec: AdapterSpec) -> types_pb2.LoraConfig:
    """The configuration that would make the same adapter anew."""
    return types_pb2.LoraConfig(
        rank=spec.rank,
        seed=spec.seed,
        alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        target_modules=spec.modules,
    )
