"""What does TLS add to a call? It, over plaintext and over mutual TLS with a key, in turn."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np

import mint
from benchmarks.service_overhead import elapsed_ms, make_data, make_model
from tests.authorities import Authority
from tests.keys import make_key
from tests.servers import running_trainer

TOKENS = 2048
ROUNDS, CALLS = 15, 10  # calls of each kind in a round; the first round warms up
TARGET_MS = 1.0  # added, median


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, ca = make_model(folder / "model"), Authority(folder / "ca")
        cert, key = ca.issue("server", "localhost", "127.0.0.1")
        secret = make_key("ada", folder / "keys")
        for variable, file in zip(("CERT", "KEY"), ca.issue("ada"), strict=True):
            os.environ[f"MINT_TLS_{variable}"] = str(file)
        os.environ["MINT_TLS_CA"] = str(ca.file)
        flags = {"tls_cert": cert, "tls_key": key, "client_ca": ca.file, "keys": folder / "keys"}
        with (
            running_trainer(model, folder / "plain") as plain,
            running_trainer(model, folder / "tls", tenant_by="both", **flags) as secured,
            mint.ServiceClient(base_url=plain.address) as one,
            mint.ServiceClient(base_url=secured.address, api_key=secret) as other,
        ):
            runs = [each.create_lora_training_client(rank=16, seed=0) for each in (one, other)]
            data, _ = make_data(1, TOKENS)
            times = [
                [
                    [elapsed_ms(run.forward_backward(data).result) for _ in range(CALLS)]
                    for run in runs
                ]
                for _ in range(ROUNDS)
            ]
    without, with_tls = np.array(times)[1:].swapaxes(0, 1)
    row = {
        "name": f"forward_backward {TOKENS} tokens",
        "plain": round(float(np.median(without)), 2),
        "tls": round(float(np.median(with_tls)), 2),
        "added_ms": round(float(np.median(np.median(with_tls, 1) - np.median(without, 1))), 2),
        "target": TARGET_MS,
    }
    print("{name}: {plain} ms, by TLS {tls} ms, {added_ms} more".format_map(row))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
