"""Manages runs and checkpoints: the names of Tinker's RestClient, and what they lack."""

import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from mint import types
from mint._async_names import awaited
from mint._files.download import checkpoint_of, download, get_checkpoint
from mint._files.progress import Progress, check_progress
from mint._files.upload import described, upload
from mint._run import runs
from mint._transport.call import Call, new_request_id
from mint._transport.closing import Closing
from mint._transport.connection import Connection
from mint._transport.opening import open_servers
from mint._transport.servers import Servers
from mint.errors import refused
from mint.futures import APIFuture, on_thread
from mint.types._checks import choice, integer, switch, text, text_map, ttl
from mint.types.checkpoints import CheckpointType
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc

AccessScope = Literal["owned", "accessible"]
_MAX_PAGE_SIZE = 1000


class RestClient(Closing):
    """Returns futures at once; an `*_async` name awaited gives the value. Made by
    `ServiceClient.create_rest_client`, or alone, with the same arguments and environment.

    Paths are those that saves answer; without `@<revision>` they mean the newest revision. What
    belongs to others is NotFoundError.
    """

    def __init__(
        self,
        _servers: Servers | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        default_headers: Mapping[str, str] | None = None,
    ) -> None:
        self._owns = _servers is None
        self._servers = _servers or open_servers(base_url, api_key, timeout, default_headers)[1]
        self._trainer = self._servers.trainer

    @property
    def _stub(self) -> checkpoint_pb2_grpc.CheckpointServiceStub:
        return self._trainer.checkpoints  # of this process

    # The server

    def get_server_capabilities(self) -> APIFuture[types.GetServerCapabilitiesResponse]:
        """What the server can do, asked anew."""
        return on_thread(partial(self._servers.capabilities, self._trainer, fresh=True))

    # Runs

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """A run's description. `access_scope` makes no difference: nothing is shared here."""
        _check_scope(access_scope)
        return runs.get_run(self._trainer, training_run_id).submit()

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """The run that a checkpoint belongs to."""
        parsed = types.ParsedCheckpointPath.parse(tinker_path)
        return self.get_training_run(parsed.training_run_id, access_scope)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        *,
        metadata_filter: Mapping[str, str] | None = None,
        kind: types.RunKind | None = None,
    ) -> APIFuture[types.TrainingRunsResponse]:
        """Runs, newest first, those of uploaded adapters too; `kind` is "trained" or "uploaded" for
        one sort alone. Only those whose metadata holds all of the filter.
        """
        _check_scope(access_scope)

        def page(answer: types.ListTrainingRunsResponse) -> types.TrainingRunsResponse:
            cursor = types.Cursor(offset, limit, answer.total_size)
            return types.TrainingRunsResponse(answer.training_runs, cursor)

        call = runs.list_runs(
            self._trainer,
            page_size=_page_size(limit),
            skip=offset,
            metadata=metadata_filter,
            kind=kind,
        )
        return call.then(page).submit()

    def update_training_run(
        self, training_run_id: str, user_metadata: Mapping[str, str]
    ) -> APIFuture[types.TrainingRun]:
        """Replaces a run's metadata."""
        return runs.update_run(self._trainer, training_run_id, user_metadata).submit()

    def delete_training_run(
        self, training_run_id: str, *, delete_checkpoints: bool = False
    ) -> APIFuture[None]:
        """Deletes a run; its named checkpoints stay unless `delete_checkpoints`."""
        return runs.delete_run(self._trainer, training_run_id, delete_checkpoints).submit()

    # Checkpoints

    def get_checkpoint(self, path: str) -> APIFuture[types.Checkpoint]:
        """A checkpoint's description."""
        return get_checkpoint(self._trainer, path).submit()

    def get_weights_info_by_tinker_path(
        self, tinker_path: str
    ) -> APIFuture[types.WeightsInfoResponse]:
        """The base model and the adapter's shape."""
        call = get_checkpoint(self._trainer, tinker_path)
        return call.then(types.WeightsInfoResponse.from_checkpoint).submit()

    def list_checkpoints(self, training_run_id: str) -> APIFuture[types.CheckpointsListResponse]:
        """All named checkpoints of a run, newest first."""
        return on_thread(partial(_all_checkpoints, self._trainer, training_run_id))

    def list_user_checkpoints(
        self,
        limit: int = 100,
        offset: int = 0,
        *,
        training_run_id: str = "",
        checkpoint_type: CheckpointType | None = None,
        metadata_filter: Mapping[str, str] | None = None,
    ) -> APIFuture[types.CheckpointsListResponse]:
        """Your named checkpoints, newest first, the newest revision of each name: `limit` of them
        after the first `offset` that the filters leave.
        """
        request = checkpoint_pb2.ListCheckpointsRequest(
            training_run_id=text(training_run_id, "training_run_id"),
            page_size=_page_size(limit),
            metadata_filter=text_map(metadata_filter, "metadata_filter"),
            skip=integer(offset, "offset"),
        )
        if checkpoint_type is not None:
            remedy = f"give one of {', '.join(get_args(CheckpointType))}, or None for all"
            enum = checkpoint_pb2.CheckpointKind
            request.kind = choice(enum, checkpoint_type, "checkpoint_type", remedy)

        def page(answer: checkpoint_pb2.ListCheckpointsResponse) -> types.CheckpointsListResponse:
            found = list(map(types.Checkpoint.from_proto, answer.checkpoints))
            cursor = types.Cursor(offset, limit, answer.total_size)
            return types.CheckpointsListResponse(found, cursor)

        return Call(self._trainer, self._stub.ListCheckpoints, request, page).submit()

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: float | None
    ) -> APIFuture[types.Checkpoint]:
        """Has a checkpoint deleted so long from now; None: it is kept."""
        path, lifetime = text(tinker_path, "path"), ttl(ttl_seconds)
        return self._update(path, ttl=lifetime, keep=True if lifetime is None else None)

    def set_checkpoint_metadata(
        self, path: str, user_metadata: Mapping[str, str]
    ) -> APIFuture[types.Checkpoint]:
        """Replaces a checkpoint's metadata."""
        path, entries = text(path, "path"), text_map(user_metadata, "user_metadata")
        return self._update(path, metadata=checkpoint_pb2.CheckpointMetadata(entries=entries))

    def copy_checkpoint(
        self, path: str, name: str, *, ttl_seconds: float | None = None
    ) -> APIFuture[types.Checkpoint]:
        """Copies a checkpoint under another name of its run, also an unnamed snapshot, which is
        kept then. The copy takes no room of its own. ConflictError if the name is taken.
        """
        return self._copy(path, name, ttl_seconds).submit()

    def copy_weights(
        self,
        path: str,
        destination_project_id: None = None,
        *,
        ttl_seconds: float | None = None,
        weights_access_token: None = None,
    ) -> APIFuture[str]:
        """As `copy_checkpoint`, under a name that is drawn; gives the copy's path. There are no
        projects here, and no tokens for other people's checkpoints.
        """
        _refuse(destination_project_id, "destination_project_id")
        _refuse(weights_access_token, "weights_access_token")
        name = f"copy-{secrets.token_hex(8)}"
        return self._copy(path, name, ttl_seconds).then(lambda copy: copy.path).submit()

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Deletes a checkpoint with all its revisions; `checkpoint_id` is as in `weights/a`."""
        return self.delete_checkpoint_from_tinker_path(f"mint://{training_run_id}/{checkpoint_id}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Deletes a checkpoint: with `@<revision>` that revision, without it all of them."""
        path = types.ParsedCheckpointPath.parse(tinker_path).path
        request = checkpoint_pb2.DeleteCheckpointRequest(path=path, request_id=new_request_id())
        method = self._stub.DeleteCheckpoint
        return Call(self._trainer, method, request, lambda answer: None).submit()

    def download_checkpoint(
        self, path: str, folder: str | Path, *, progress: Progress | bool = False
    ) -> APIFuture[Path]:
        """Brings a checkpoint's files into a new folder, which `PeftModel.from_pretrained` opens,
        or of a merged model `AutoModelForCausalLM.from_pretrained`; gives the folder.

        The folder is there once all files are, and match their SHA-256. A connection that breaks is
        made again, and the download goes on where it was; after an error, so does the next one into
        the same folder. `progress` is called with bytes done and bytes in all, or True for a bar
        (tqdm).
        """
        check_progress(progress)
        path = text(path, "path")
        return on_thread(partial(download, self._trainer, path, Path(folder), progress))

    def upload_checkpoint(
        self,
        folder: str | Path,
        name: str,
        *,
        ttl_seconds: float | None = None,
        user_metadata: Mapping[str, str] | None = None,
        base_model: str | None = None,
        with_optimizer: bool = False,
        progress: Progress | bool = False,
    ) -> APIFuture[types.Checkpoint]:
        """Uploads a LoRA adapter in PEFT's layout: `adapter_config.json` and
        `adapter_model.safetensors` of a folder. The checkpoint can be sampled from, be loaded into
        a run of its shape, and runs can be created from it, which take over rank, alpha and
        modules.

        `base_model` is the served name of the adapter's base, if its configuration has another for
        it. With `with_optimizer` the folder is one of downloaded training state, and so is the
        checkpoint. DoRA, rank and alpha patterns, biases, modules trained whole and whatever else
        is not plain LoRA on linear layers is BadRequestError, by name. Dropout is taken and has no
        effect: there is none here.
        """
        check_progress(progress)
        source, with_optimizer = Path(folder), switch(with_optimizer, "with_optimizer")

        def send() -> types.Checkpoint:
            header = checkpoint_pb2.UploadHeader(
                request_id=new_request_id(),
                name=text(name, "name"),
                files=described(source, with_optimizer),
                metadata=text_map(user_metadata, "user_metadata"),
                ttl=ttl(ttl_seconds),
                base_model=text(base_model or "", "base_model"),
            )
            return upload(self._trainer, source, header, progress)

        return on_thread(send)

    def export_checkpoint(
        self,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        *,
        ttl_seconds: float | None = None,
    ) -> APIFuture[types.ExportResponse]:
        """Merges an adapter into its base model, on the server; `download_checkpoint` of the
        answer's `path` then gives a model folder that any engine opens. Without `dtype`: the base
        model's own. The merged model is kept for `ttl_seconds`, or a day.
        """
        remedy = "give float32, bfloat16 or float16, or None for the base model's own"
        enum = checkpoint_pb2.ExportDtype
        request = checkpoint_pb2.ExportCheckpointRequest(
            path=text(path, "path"),
            request_id=new_request_id(),
            dtype=None if dtype is None else choice(enum, dtype, "dtype", remedy),
            ttl=ttl(ttl_seconds),
        )
        convert = types.ExportResponse.from_proto
        return Call(self._trainer, self._stub.ExportCheckpoint, request, convert).submit()

    def close(self) -> None:
        """Closes the connection, unless a ServiceClient shares it."""
        if self._owns:
            self._servers.close()

    get_server_capabilities_async = awaited(get_server_capabilities)
    get_training_run_async = awaited(get_training_run)
    get_training_run_by_tinker_path_async = awaited(get_training_run_by_tinker_path)
    list_training_runs_async = awaited(list_training_runs)
    update_training_run_async = awaited(update_training_run)
    delete_training_run_async = awaited(delete_training_run)
    get_checkpoint_async = awaited(get_checkpoint)
    get_weights_info_by_tinker_path_async = awaited(get_weights_info_by_tinker_path)
    list_checkpoints_async = awaited(list_checkpoints)
    list_user_checkpoints_async = awaited(list_user_checkpoints)
    set_checkpoint_ttl_from_tinker_path_async = awaited(set_checkpoint_ttl_from_tinker_path)
    set_checkpoint_metadata_async = awaited(set_checkpoint_metadata)
    copy_checkpoint_async = awaited(copy_checkpoint)
    copy_weights_async = awaited(copy_weights)
    delete_checkpoint_async = awaited(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = awaited(delete_checkpoint_from_tinker_path)
    download_checkpoint_async = awaited(download_checkpoint)
    upload_checkpoint_async = awaited(upload_checkpoint)
    export_checkpoint_async = awaited(export_checkpoint)

    def _update(self, path: str, **change: Any) -> APIFuture[types.Checkpoint]:
        request = checkpoint_pb2.UpdateCheckpointRequest(
            path=path, request_id=new_request_id(), **change
        )
        method = self._stub.UpdateCheckpoint
        return Call(self._trainer, method, request, checkpoint_of).submit()

    def _copy(self, path: str, name: str, ttl_seconds: float | None) -> Call[types.Checkpoint]:
        request = checkpoint_pb2.CopyCheckpointRequest(
            path=text(path, "path"),
            request_id=new_request_id(),
            name=text(name, "name"),
            ttl=ttl(ttl_seconds),
        )
        return Call(self._trainer, self._stub.CopyCheckpoint, request, checkpoint_of)


def _all_checkpoints(trainer: Connection, training_run_id: str) -> types.CheckpointsListResponse:
    """All named checkpoints of a run, page by page."""
    request = checkpoint_pb2.ListCheckpointsRequest(
        training_run_id=text(training_run_id, "training_run_id"), page_size=_MAX_PAGE_SIZE
    )
    method = trainer.checkpoints.ListCheckpoints
    found: list[types.Checkpoint] = []
    while True:
        page = Call(trainer, method, request, lambda answer: answer).ask()
        found += map(types.Checkpoint.from_proto, page.checkpoints)
        if not page.next_page_token:
            return types.CheckpointsListResponse(found)
        request.page_token = page.next_page_token


def _page_size(limit: int) -> int:
    """How many entries to ask for at once."""
    if not 1 <= integer(limit, "limit") <= _MAX_PAGE_SIZE:
        raise refused(
            "limit", f"is {limit}; it must be 1 to {_MAX_PAGE_SIZE}, and `offset` gives the rest"
        )
    return int(limit)


def _check_scope(access_scope: str) -> None:
    if access_scope not in ("owned", "accessible"):
        raise refused(
            "access_scope",
            f"is {access_scope!r}; give 'owned' or 'accessible', which are the same here",
        )


def _refuse(value: object, field: str) -> None:
    if value is not None:
        raise refused(field, "cannot be set: there is no such thing here")
