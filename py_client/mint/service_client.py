"""Where everything starts: opens runs and makes the other clients."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from mint import types
from mint._async_names import awaited, off_loop
from mint._run.runs import create_run, delete_run, get_run, list_runs, open_run, update_run
from mint._run.watch import RunWatch
from mint._transport.closing import Closing
from mint._transport.connection import Connection
from mint._transport.opening import open_servers
from mint.errors import refused
from mint.futures import APIFuture
from mint.rest_client import RestClient
from mint.sampling_client import SamplingClient, create_sampling_client, refuse_retry_config
from mint.training_client import TrainingClient
from mint.types._checks import switch, text, text_map
from mintrpc.v1 import trainer_pb2


class ServiceClient(Closing):
    """Opens training runs and makes clients. Construction reads the environment and sends nothing.

    What is left out or None comes from the environment or the nearest `.env`: `base_url` from
    MINT_BASE_URL (else 127.0.0.1:50051), `api_key` from MINT_API_KEY. `timeout` is how many
    seconds a call bears a server that is silent before it fails (default: an hour); a server that
    works for longer is waited for. One that has never answered is given 20 seconds.
    """

    def __init__(
        self,
        user_metadata: Mapping[str, str] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        default_headers: Mapping[str, str] | None = None,
    ) -> None:
        self._user_metadata = text_map(user_metadata, "user_metadata")
        self._environment, self._servers = open_servers(base_url, api_key, timeout, default_headers)
        self._trainer = self._servers.trainer

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """What the server can do, asked anew."""
        return self._servers.capabilities(self._trainer, fresh=True)

    def create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        *,
        alpha: float = 32.0,
        use_rslora: bool = False,
        target_modules: Sequence[str] | None = None,
        train_experts: bool | None = None,
        isolated: bool = False,
        retention: timedelta | None = None,
    ) -> TrainingClient:
        """Creates a run with a fresh adapter.

        `base_model` left out: MINT_BASE_MODEL, else Qwen/Qwen3-0.6B if served, else the one that
        is. `rank` left out: MINT_LORA_RANK, else 16. `target_modules` names modules as PEFT does
        and stands instead of the `train_*` switches. `train_experts=False` leaves the experts of a
        base model that has any out of what `train_mlp` trains. `isolated` runs share no pass with
        others and use deterministic algorithms: slower, and bitwise repeatable on a GPU too.
        `retention` is how long the run is kept after its last call; left out, as long as the server
        keeps runs.
        """
        config = types.LoraConfig(
            rank=int(self._environment["MINT_LORA_RANK"]) if rank is None else rank,
            seed=seed,
            train_unembed=train_unembed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            alpha=alpha,
            use_rslora=use_rslora,
            target_modules=[] if target_modules is None else target_modules,  # type: ignore[arg-type]
            train_experts=train_experts,
        )
        request = trainer_pb2.CreateTrainingRunRequest(
            base_model=self._base_model(base_model),
            lora_config=config.to_proto(),
        )
        return self._create(request, user_metadata, isolated, retention)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        isolated: bool = False,
        retention: timedelta | None = None,
    ) -> TrainingClient:
        """Creates a run with a checkpoint's configuration and weights, and a fresh optimizer.

        `base_model` left out is the checkpoint's, which the server must serve either way.
        """
        request = _continuing(path, base_model, with_optimizer=False)
        return self._create(request, user_metadata, isolated, retention)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        isolated: bool = False,
        retention: timedelta | None = None,
    ) -> TrainingClient:
        """Creates a run that continues a checkpoint's: weights, optimizer state and step."""
        request = _continuing(path, base_model, with_optimizer=True)
        return self._create(request, user_metadata, isolated, retention)

    def open_training_run(self, training_run_id: str) -> TrainingClient:
        """Takes a run over; the client that used it before cannot use it any more.

        `training_run` of the returned client says at which step it is and whether a gradient is
        pending: go on with it, or call `discard_gradient`.
        """
        opened = open_run(self._asked(), training_run_id).ask()
        return TrainingClient(self._servers, opened)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: None = None,
    ) -> SamplingClient:
        """Returns a client of the revision at `model_path` that is now the newest; without a path,
        of the base model."""
        refuse_retry_config(retry_config)
        if not model_path:
            base_model = self._base_model(base_model)
        return create_sampling_client(self._servers, model_path, base_model)

    def get_training_run(self, training_run_id: str) -> types.TrainingRun:
        """A run's description. Does not take the run over."""
        return get_run(self._asked(), training_run_id).ask()

    def list_training_runs(
        self,
        page_size: int = 100,
        page_token: str = "",
        metadata_filter: Mapping[str, str] | None = None,
        *,
        kind: types.RunKind | None = None,
    ) -> types.ListTrainingRunsResponse:
        """One page of your runs, newest first: those whose metadata holds all of the filter, of
        both kinds unless `kind` is "trained" or "uploaded".
        """
        asked = self._asked()
        return list_runs(
            asked, page_size=page_size, page_token=page_token, metadata=metadata_filter, kind=kind
        ).ask()

    def update_training_run(
        self, training_run_id: str, metadata: Mapping[str, str]
    ) -> types.TrainingRun:
        """Replaces a run's metadata."""
        return update_run(self._asked(), training_run_id, metadata).ask()

    def delete_training_run(
        self, training_run_id: str, *, delete_checkpoints: bool = False
    ) -> None:
        """Deletes a run; its named checkpoints stay unless `delete_checkpoints`."""
        delete_run(self._asked(), training_run_id, delete_checkpoints).ask()

    def watch_training_run(self, training_run_id: str) -> RunWatch:
        """As `TrainingClient.watch`, of any run of yours. Does not take the run over."""
        return RunWatch(self._asked(), text(training_run_id, "training_run_id"))

    def create_rest_client(self) -> RestClient:
        """Returns a client that manages checkpoints and runs, over the same connection."""
        return RestClient(self._servers)

    def copy_weights(
        self, path: str, *, ttl_seconds: float | None = None, weights_access_token: None = None
    ) -> APIFuture[str]:
        """As `RestClient.copy_weights`."""
        return self.create_rest_client().copy_weights(
            path, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token
        )

    def close(self) -> None:
        """Closes the connections, also those of the clients made here. Calls without an answer
        fail; training calls that the server has accepted run on there."""
        self._servers.close()

    get_server_capabilities_async = off_loop(get_server_capabilities)
    create_lora_training_client_async = off_loop(create_lora_training_client)
    create_training_client_from_state_async = off_loop(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = off_loop(
        create_training_client_from_state_with_optimizer
    )
    open_training_run_async = off_loop(open_training_run)
    create_sampling_client_async = off_loop(create_sampling_client)
    create_rest_client_async = off_loop(create_rest_client)
    copy_weights_async = awaited(copy_weights)
    get_training_run_async = off_loop(get_training_run)
    list_training_runs_async = off_loop(list_training_runs)
    update_training_run_async = off_loop(update_training_run)
    delete_training_run_async = off_loop(delete_training_run)

    def _asked(self) -> Connection:
        """The trainer, once it has said what it is, and so also that it is a sampler."""
        self._servers.capabilities(self._trainer)
        return self._trainer

    def _base_model(self, base_model: str | None) -> str:
        """The name to ask for; empty: what the server prefers."""
        return text(base_model or self._environment["MINT_BASE_MODEL"], "base_model")

    def _create(
        self,
        request: trainer_pb2.CreateTrainingRunRequest,
        user_metadata: Mapping[str, str] | None,
        isolated: bool,
        retention: timedelta | None,
    ) -> TrainingClient:
        request.isolated = switch(isolated, "isolated")
        if retention is not None:
            if not isinstance(retention, timedelta) or retention <= timedelta(0):
                raise refused("retention", f"is {retention!r}; give a positive datetime.timedelta")
            request.retention.FromTimedelta(retention)
        trainer = self._asked()  # or else there would be a run unused
        request.metadata.update(self._user_metadata)
        request.metadata.update(text_map(user_metadata, "user_metadata"))
        return TrainingClient(self._servers, create_run(trainer, request).ask())


def _continuing(
    path: str, base_model: str | None, *, with_optimizer: bool
) -> trainer_pb2.CreateTrainingRunRequest:
    """The request of a run that begins with a checkpoint's weights."""
    return trainer_pb2.CreateTrainingRunRequest(
        base_model=text(base_model or "", "base_model"),
        checkpoint={"path": text(path, "path"), "with_optimizer": with_optimizer},
    )
