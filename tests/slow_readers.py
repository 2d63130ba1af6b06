"""Streams that are begun and read no further, over connections that take in little ahead of their
reader: `python -m tests.slow_readers ADDRESS COUNT` writes a line once each has its first tokens,
and waits to be killed.
"""

import signal
import sys

import grpc

from mintrpc.v1 import sampler_pb2, sampler_pb2_grpc
from tests.samplers import DEADLINE_S, sample_request


def main() -> None:
    address, count = sys.argv[1], int(sys.argv[2])
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
    options += [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    channels = [grpc.insecure_channel(address, options) for _ in range(count)]
    request = sampler_pb2.StreamSampleRequest(
        sample=sample_request(num_samples=16, params={"max_tokens": 300, "seed": 3})
    )
    stubs = [sampler_pb2_grpc.SamplerServiceStub(channel) for channel in channels]
    streams = [stub.StreamSample(request, timeout=DEADLINE_S) for stub in stubs]
    for stream in streams:
        next(stream)
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
