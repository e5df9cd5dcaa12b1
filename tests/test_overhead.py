"""Output of `make bench`: a ratio has an interval and is left out if that contains 1; and its tables run."""

import pytest

from research.benchmarks.overhead.contestants import Size
from research.benchmarks.overhead.tables import TABLES, Bench
from research.benchmarks.overhead.timing import Seconds, ratio, shown, table


ONES = [1.0] * 40


def test_ratio_is_printed_if_it_differs_from_1():
    assert shown(ratio([1.1] * 40, ONES)) == "1.100 [1.100, 1.100]"
    assert shown(ratio([0.9, 1.1] * 20, ONES)) == "[0.900, 1.100]"
    assert shown(ratio([1.1] * 5, ONES[:5])) == "(fewer than 6 pairs)"


def test_a_trigger_in_twelve_chunks_counts_in_their_sum():
    """The median of single chunks would miss it."""
    triggered = Seconds(*[([1.0] * 11 + [2.0]) * 6] * 2)
    results = {"shut": Seconds([1.0] * 72, [1.0] * 72).summed(12), "open": triggered.summed(12)}
    assert "to shut: 1.083 [1.083, 1.083]" in table(results, "cpu", ["shut"])


@pytest.mark.parametrize("name, num_chunks", [("floor", 4), ("batch", 4), ("keys", 6)])
def test_tables_run(name, num_chunks, capsys):
    size = Size(heads=2, head_dim=12, ffn_dim=24, layers=1, latent=(4, 4), text=(4, 8))
    bench = Bench(size.build("cpu"), size, "cpu", 1, num_chunks, windows=[9], before=None)
    TABLES[name](bench)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 3 and "fewer than 6 pairs" in printed
