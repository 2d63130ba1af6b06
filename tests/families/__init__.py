"""The families of base models that tests know: which are served, which are refused and why.

`python -m tests.families` prints docs/models.md, which is made from these tables.
"""

from tests.families.composites import COMPOSITES
from tests.families.dense import DENSE
from tests.families.hybrids import HYBRID_MIXTURES, HYBRIDS
from tests.families.mixtures import MIXTURES
from tests.families.refusals import REFUSED
from tests.families.sights import SIGHTS
from tests.family import Family

FAMILIES: tuple[Family, ...] = (
    *DENSE,
    *COMPOSITES,
    *MIXTURES,
    *HYBRIDS,
    *HYBRID_MIXTURES,
    *SIGHTS,
    *REFUSED,
)


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
