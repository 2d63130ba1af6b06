"""Sequenced requests: no content, however odd, does more than be refused."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_core.errors import InvalidRequest, Unimplemented
from mintrpc.v1 import trainer_pb2, types_pb2
from tests.unit.trainer_service.wire.test_sequenced_requests import PLACE, parse
from trainer_service.calls import Compute, Refused, Step

TENSORS = st.builds(
    types_pb2.TensorData,
    dtype=st.integers(0, 4),
    shape=st.lists(st.integers(-2, 4) | st.integers(-(2**63), 2**63 - 1), max_size=3),
    values=st.binary(max_size=32),
)
CHUNKS = st.builds(
    types_pb2.ModelInputChunk,
    encoded_text=st.none()
    | st.builds(types_pb2.EncodedTextChunk, tokens=st.lists(st.integers(-1, 101), max_size=9)),
)
DATA = st.builds(
    types_pb2.Datum,
    model_input=st.builds(types_pb2.ModelInput, chunks=st.lists(CHUNKS, max_size=3)),
    loss_fn_inputs=st.dictionaries(
        st.sampled_from(["target_tokens", "weights", "logprobs", "advantages", ""]), TENSORS
    ),
)


@settings(max_examples=300)
@given(
    st.builds(
        trainer_pb2.ForwardBackwardRequest,
        training_run_id=st.just("run-1"),
        sequence=st.just(1),
        writer_epoch=st.just(1),
        data=st.lists(DATA, max_size=3),
        logprob_scope=st.integers(0, 3),
        ppo=st.none()
        | st.builds(types_pb2.Ppo, clip_low_threshold=st.floats(), clip_high_threshold=st.floats()),
    )
)
def test_no_batch_crashes(request: trainer_pb2.ForwardBackwardRequest) -> None:
    work = parse(request).work
    if isinstance(work, Refused):
        assert isinstance(work.error, InvalidRequest | Unimplemented)
    else:
        assert isinstance(work, Compute)
        for document in work.documents:
            assert len(document.tokens) == len(document.targets) == len(document.weights)
            assert np.isfinite(document.weights).all()


@settings(max_examples=200)
@given(
    st.builds(
        types_pb2.AdamParams,
        **{
            name: st.none() | st.floats()
            for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
        },
    )
)
def test_no_adam_params_crash(params: types_pb2.AdamParams) -> None:
    work = parse(trainer_pb2.OptimStepRequest(**PLACE, adam_params=params)).work
    if isinstance(work, Refused):
        assert isinstance(work.error, InvalidRequest)
    else:
        assert isinstance(work, Step)
        assert 0 <= work.adam_params.beta1 < 1
