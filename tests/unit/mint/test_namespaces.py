"""The other names under which scripts look for what is here."""

import subprocess
import sys

import pytest

import mint
import mint.recipe
from mint import types


def test_tinker_has_the_same_objects() -> None:
    from mint import tinker

    assert tinker.__all__ == mint.__all__
    assert all(getattr(tinker, name) is getattr(mint, name) for name in mint.__all__)
    assert tinker.types is types


def test_renderers_are_reached_by_three_ways() -> None:
    import mint.mint as mintx
    import mint.renderers

    for name in mint.recipe.renderers.__all__:
        wanted = getattr(mint.recipe.renderers, name)
        assert getattr(mint.renderers, name) is wanted
        assert getattr(mintx.renderers, name) is wanted


def test_the_renderers_quickstart_of_mint_finds_its_names() -> None:
    import mint.mint.renderers as renderers

    for name in ("get_recommended_renderer_name", "datum_from_model_input_weights"):
        assert getattr(renderers, name) is getattr(mint.recipe, name)
        assert getattr(mint.renderers, name) is getattr(mint.recipe, name)


def test_mints_own_extensions_have_their_names() -> None:
    from mint import mint as mintx

    assert mint.__version__ == mintx.MINT_VERSION
    mintx.sync_env()
    mintx.apply_mint_patches()


def test_an_import_of_mint_alone_reaches_them() -> None:
    program = (
        "import mint\n"
        "assert mint.tinker.APITimeoutError is mint.APITimeoutError\n"
        "assert mint.mint.renderers.get_renderer is mint.renderers.get_renderer\n"
        "assert mint.__tinker_version__\n"
        "import threading; assert threading.active_count() == 1\n"
        "import sys; assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mint.nothing  # noqa: B018 - the access is the test
