"""What one tenant may have, by a file that may change."""

import os
from pathlib import Path
from urllib.request import urlopen

import pytest

from mint_core.errors import FailedPrecondition
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import Account, QuotaBook, QuotaExceeded, Quotas

FILE = """
runs = 3
[tenant.ann]
runs = 5
"""


def book_of(file: Path, text: str = FILE) -> QuotaBook:
    file.write_text(text)
    return QuotaBook(file, Metrics())


def test_a_tenant_has_its_own_numbers_or_those_of_all(tmp_path: Path) -> None:
    book = book_of(tmp_path / "quotas")
    assert (book.of("ann").runs, book.of("bob").runs) == (5, 3)
    assert book.of("bob").calls == Quotas().calls
    assert QuotaBook(None, Metrics()).of("ann") == Quotas()


def test_the_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "quotas"
    book = book_of(file)
    for text, runs in (("runs = 70", 70), ("runs = ", 70), ("runs = 8", 8)):
        file.write_text(text)
        os.utime(file, ns=(0, len(text)))
        assert book.of("bob").runs == runs


@pytest.mark.parametrize(
    "text",
    [
        "rums = 3",
        "runs = -1",
        "runs = 2.5",
        "runs = true",
        "[tenant.a]\nx = 1",
        "tenant = 3",
        "]",
        "x=" + "[" * 9999,
    ],
)
def test_a_bad_file_is_refused_at_start(tmp_path: Path, text: str) -> None:
    with pytest.raises(FailedPrecondition, match="`quotas` file"):
        book_of(tmp_path / "quotas", text)


def test_a_missing_file_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="No such file"):
        QuotaBook(tmp_path / "none", Metrics())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FailedPrecondition, match="it is no regular file"):
        QuotaBook(tmp_path / "pipe", Metrics())


def test_a_refusal_says_what_how_much_and_the_way_out(tmp_path: Path) -> None:
    book = book_of(tmp_path / "quotas")
    book.check("bob", "runs", 3, "training runs", "delete some", passes=False)
    with pytest.raises(QuotaExceeded) as caught:
        book.check("bob", "runs", 4, "training runs", "delete some", passes=False)
    assert caught.value.message == (
        "this would be 4 training runs of yours, and the quota `runs` of this server allows 3; "
        "delete some"
    )
    assert caught.value.retry_after_s is None


def test_an_account_counts_each_tenant_for_itself_and_lets_one_alone_be_large(
    tmp_path: Path,
) -> None:
    book = book_of(tmp_path / "quotas", "request_mib = 2")
    account = Account(book, "request_mib", "MiB under way", "wait", unit=2**20, passes=True)
    with account.holding("ann", 5 * 2**20):
        more = account.holding("ann", 1)
        with pytest.raises(QuotaExceeded, match="`request_mib`") as caught, more:
            raise AssertionError("was let in")
        assert caught.value.retry_after_s is not None
        with account.holding("bob", 2**20), account.holding("bob", 2**20):
            assert account.held["bob"] == 2 * 2**20
    assert account.held["ann"] == account.held["bob"] == 0
    with account.holding("ann", 1):
        pass


def test_what_tenants_hold_is_a_metric(tmp_path: Path) -> None:
    metrics = Metrics()
    account = Account(QuotaBook(None, metrics), "request_mib", "MiB", "wait", unit=2**20)
    account.add("ann", 3 * 2**19)
    account.add("bob", 1)
    account.add("bob", -1)
    port = metrics.serve("127.0.0.1:0")

    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()

    used = [line for line in lines if line.startswith("mint_quota_used{")]
    assert used == ['mint_quota_used{quota="request_mib",tenant="ann"} 1.5']
