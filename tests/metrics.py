"""What a service tells Prometheus."""

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

SCRAPE_LIMIT_S = 10.0
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(address: str) -> Samples:
    """All samples, by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=SCRAPE_LIMIT_S) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


def value(samples: Samples, name: str, **labels: str) -> float:
    """A sample's value; 0 if it is not there yet."""
    return samples.get((name, frozenset(labels.items())), 0.0)
