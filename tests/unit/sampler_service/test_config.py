"""What the sampler refuses to be told."""

from pathlib import Path

import pytest

from sampler_service.config import SamplerConfig

FILE = Path("a")


def test_the_defaults_are_legal() -> None:
    config = SamplerConfig(base_model="m")
    assert config.address == "127.0.0.1:50052"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"max_adapters": 0}, "`max_adapters` must be at least 1, got 0"),
        ({"max_running_samples": 0}, "`max_running_samples` must be at least 1"),
        ({"max_batch_tokens": 520}, "`max_batch_tokens` must be at least 576, or 0"),
        ({"kv_cache_tokens": -1}, "`kv_cache_tokens` must be at least 512, or 0"),
        ({"queue_samples": 0}, "`queue_samples` must be at least 1"),
        ({"queue_tokens": 0}, "`queue_tokens` must be at least 1"),
        ({"batch_invariant": True, "trade_bits_for_speed": True}, "exclude each other; give one"),
        ({"max_wait_s": -1.0}, "`max_wait_s` must be at least 0, got -1.0"),
        ({"max_wait_s": float("inf")}, "`max_wait_s` must be at least 0"),
        ({"address": "0.0.0.0:1"}, "needs `keys`"),
        ({"store": "http://gpu-node:50051"}, "another host and so needs TLS; write https://"),
        ({"store": "https://gpu-node:50051/a"}, "is no trainer's; write https://HOST:PORT"),
        ({"store": "https://gpu-node:99999"}, "has no such port"),
        ({"store": "http://[::1]", "store_tls_ca": FILE}, "`store_tls_ca` is of no use"),
        ({"store": "https://a", "store_tls_key": FILE}, "`store_tls_key` go together"),
        ({"store_api_key": FILE}, "`store_api_key` is for a trainer's address, and `store` .store"),
        ({"store": "https://a", "snapshot_memory_folder": FILE}, "`snapshot_memory_folder` is for"),
        ({"replicas": 0}, "`replicas` must be at least 1, got 0"),
        ({"devices": "cpu,cpu"}, "`devices` names 2 and `replicas` is 1; name one device for"),
        ({"replicas": 2, "devices": "cpu,gpu"}, "`devices` names 'gpu'; give cpu, cuda or cuda:N"),
        ({"replicas": 2, "devices": "cpu,cuda"}, "of two kinds"),
        ({"devices": "cuda:0", "device": "cpu"}, "`device` cpu is none of `devices` cuda:0"),
        ({"memory_share": 1.5}, "`memory_share` must be from 0 to 1, got 1.5"),
        ({"memory_share": float("nan")}, "`memory_share` must be from 0 to 1"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplerConfig(base_model="m", **flags)  # type: ignore[arg-type]


def test_a_trainers_address_is_read_as_clients_read_it() -> None:
    for store, target in {
        "https://gpu-node:50051": "gpu-node:50051",
        "https://gpu-node/": "gpu-node:443",
        "http://127.0.0.1": "127.0.0.1:50051",
        "http://[::1]:7": "[::1]:7",
    }.items():
        access = SamplerConfig(base_model="m", store=store).trainer_access()
        assert access is not None
        assert (access.target, access.tls) == (target, store.startswith("https"))
    assert SamplerConfig(base_model="m", store="s3://bucket").trainer_access() is None


def test_each_replica_has_its_device_and_its_part_of_the_share() -> None:
    config = SamplerConfig(replicas=3, devices="cuda:0,cuda:1,cuda:1", memory_share=0.5)
    each = [config.of_replica(number) for number in range(3)]
    assert [own.device for own in each] == ["cuda:0", "cuda:1", "cuda:1"]
    assert [own.own_share for own in each] == [0.5, 0.25, 0.25]
    assert SamplerConfig(replicas=2).of_replica(1).device == "auto"
    assert SamplerConfig(replicas=2).of_replica(1).sharers == 2
    assert SamplerConfig(replicas=2, engines_on="ray").of_replica(1).sharers == 1


def test_a_replica_that_comes_later_shares_with_those_that_are_there() -> None:
    config = SamplerConfig(replicas=2, devices="cuda:0,cuda:1", memory_share=0.6)
    own = config.beside(["cuda:0", "cuda:1"], "cuda:1")
    assert (own.device, own.own_share, own.replicas) == ("cuda:1", 0.3, 3)
    own = SamplerConfig().beside(["auto", "auto"], "auto")
    assert (own.device, own.sharers) == ("auto", 3)
    with pytest.raises(ValueError, match="of two kinds"):
        SamplerConfig(device="cpu").beside(["cpu"], "cuda")
    with pytest.raises(ValueError, match="`device` auto chose theirs"):
        SamplerConfig().beside(["auto"], "cuda:1")
