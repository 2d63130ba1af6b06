import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ray_cluster import RayPlaces, running_cluster


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[Any]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def ray_places(ray_cluster: Any) -> Iterator[RayPlaces]:
    places = RayPlaces(ray_cluster)
    yield places
    asyncio.run(places.close())
