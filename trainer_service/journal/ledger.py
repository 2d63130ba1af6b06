"""The journal as a whole: whose it is, and what it knows when the trainer starts."""

from collections.abc import Iterator
from dataclasses import dataclass

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import FailedPrecondition
from trainer_service.calls import Call, Course, Place, Refused, Work
from trainer_service.errors import RequestDamaged, StateDamaged
from trainer_service.jobs import SavedRow
from trainer_service.journal import changes, codec, queries
from trainer_service.journal.records import CallRecord, Payload, RunRecord
from trainer_service.journal.writer import Journal
from trainer_service.run_description import RunOrigin


@dataclass(frozen=True, slots=True)
class PastRun:
    """A run as it was before a restart."""

    record: RunRecord
    origin: RunOrigin
    calls: list[CallRecord]  # whose answers are not dropped
    saved_row: SavedRow | None
    dirty: bool  # whether calls behind that have changed the row

    def unanswered(self, model: ModelDescription) -> Iterator[Call]:
        """The calls that were accepted and have not ended, in order."""
        state, run = self.record.state, self.origin.training_run_id
        for record in self.calls:
            if record.answer is not None:
                continue
            place = Place(
                training_run_id=run,
                sequence=record.sequence,
                writer_epoch=state.writer_epoch,
                acknowledged_sequence=state.acknowledged,
                payload_hash=record.payload_hash,
            )
            content = codec.content_of(record.payload or b"")
            course = Course(deaths=record.deaths)
            work = self._work(record, model)
            yield Call(place, record.method, work, content, record.mark, course)

    def _work(self, record: CallRecord, model: ModelDescription) -> Work:
        run = self.origin.training_run_id
        found = Payload(record.method, record.payload_hash, record.payload or b"")
        try:
            return codec.decode_payload(found, run, record.sequence, model)
        except StateDamaged:
            return Refused(RequestDamaged(run, record.sequence))


def check_base(journal: Journal, model: ModelDescription) -> None:
    """Refuses a journal of another base model; a new one is this one's from now on."""
    found = queries.load_server(journal.database)
    if "base_fingerprint" not in found:
        values = {"base_model": model.name, "base_fingerprint": model.fingerprint}
        changes.note_server(journal.database, values)
    elif found["base_fingerprint"] != model.fingerprint:
        raise FailedPrecondition(
            f"`state` holds runs of base model {found['base_model']} with fingerprint "
            f"{found['base_fingerprint']}, and this is {model.name} with {model.fingerprint}; "
            + _remedy(found["base_fingerprint"], model)
        )


def _remedy(fingerprint: str, model: ModelDescription) -> str:
    if fingerprint != model.other_fingerprint:
        return "serve that model, or choose another folder"
    return (
        "it is the same, but for float8 weights: give --dtype as before, or choose another folder, "
        "and save from the runs first, to load with --adapters-across-dtypes, what is to go on"
    )


def next_number(journal: Journal) -> int:
    """For a new run: one that no other has ever had."""
    return int(queries.load_server(journal.database).get("last_run", 0)) + 1


def load_runs(journal: Journal) -> Iterator[PastRun]:
    """All runs, oldest first; before the journal starts."""
    database = journal.database
    for record in queries.load_runs(database):
        calls = queries.load_calls(database, record.number, record.state.dropped)
        yield PastRun(
            record,
            codec.decode_origin(record.origin),
            list(calls),
            queries.load_saved_row(database, record.number),
            dirty=bool(queries.load_past(database, record.number)),
        )
