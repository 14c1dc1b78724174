import logging
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.errors import OptionError
from batchvl.results.record import COLUMNS, Counts, Record, decode, encode, schema, to_batch
from batchvl.types import Failure, Image

from .samples import failed, sample

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.dates()
    | st.times().map(lambda t: t.replace(fold=0))  # which Arrow never sets
    | st.timedeltas()
    | st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=45))])).map(
        lambda t: t.replace(fold=0)
    )
    | st.decimals(allow_nan=False)
    | st.uuids()
)
kept_values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner), max_leaves=8
)


def test_the_schema_has_the_documented_columns_in_order() -> None:
    kept = pa.schema([("site", pa.string()), ("when", pa.timestamp("us", "UTC"))])
    names = "row id status response responses finish_reason input_tokens output_tokens images error attempts seconds"
    assert schema("int64", kept).names == [*names.split(), "site", "when"]
    assert schema("int64").field("id").type == pa.int64()
    assert schema("string").field("id").type == schema(None).field("id").type == pa.string()
    assert all(column.help for column in COLUMNS.values())


def test_a_dictionary_column_is_stored_as_its_values() -> None:
    assert schema(None, pa.schema([("site", pa.dictionary(pa.int8(), pa.string()))])).field("site").type == pa.string()


def test_a_kept_column_with_the_name_of_an_output_column_is_rejected() -> None:
    with pytest.raises(OptionError, match=r"--keep status: .* rename"):
        schema(None, pa.schema([("status", pa.string())]))


@given(
    response=st.none() | st.text(),
    responses=st.none() | st.lists(st.text()),
    row_id=st.none() | st.text() | st.integers(-(2**63), 2**63 - 1),
    kept=st.dictionaries(st.text(), kept_values),
)
def test_records_survive_a_round_trip(response, responses, row_id, kept) -> None:
    record = sample(7, response=response, responses=responses, id=row_id, kept=kept)
    decoded = decode(encode(record))
    assert decoded == record
    assert repr(decoded.kept) == repr(kept)  # 1 == 1.0 == Decimal(1): the types count as well


def test_encoding_does_not_change_the_record() -> None:
    kept = {"when": date(2024, 2, 29), "list": [Decimal("1.50")]}
    encode(sample(0, kept=kept))
    assert kept == {"when": date(2024, 2, 29), "list": [Decimal("1.50")]}


def test_kept_values_have_arrows_types_in_the_output() -> None:
    values = {
        "time": (pa.time64("us"), time(1, 2, 3, 4)),
        "day": (pa.date32(), date(1, 1, 1)),
        "local": (pa.timestamp("us"), datetime(2024, 1, 1, 12, 0, 0, 1)),
        "instant": (pa.timestamp("us", "Asia/Tokyo"), datetime(2024, 1, 1, tzinfo=UTC)),
        "span": (pa.duration("us"), timedelta(days=-3, microseconds=1)),
        "price": (pa.decimal128(38, 9), Decimal("12345678901234567890123456789.123456789")),
        "map": (pa.map_(pa.string(), pa.int64()), [("a", 1), ("b", 2)]),
        "nested": (pa.struct([("a", pa.list_(pa.binary()))]), {"a": [b"\xff", None]}),
        "large": (pa.uint64(), 2**64 - 1),
        "nan": (pa.float32(), float("nan")),
    }
    kept = pa.schema([(name, kind) for name, (kind, _) in values.items()])
    record = decode(encode(sample(0, kept={name: value for name, (_, value) in values.items()})))
    batch = to_batch([record], schema(None, kept))
    for name, (kind, value) in values.items():
        assert batch[name].equals(pa.array([value], kind)) or name == "nan", name


def test_pandas_nanoseconds_survive() -> None:
    class Timestamp(datetime):
        nanosecond = 7
        value = 1_700_000_000_000_000_007

    decoded = decode(encode(sample(0, kept={"when": Timestamp(2023, 11, 14)}))).kept["when"]
    assert pa.array([decoded], pa.timestamp("ns")).cast(pa.int64()).to_pylist() == [Timestamp.value]


def test_lone_surrogates_are_replaced() -> None:
    record = failed(3, id="a\ud800", images=[Image("\udcff.jpg")], kept={"x\udc00": ["\ud83d\ude00"]})
    record.error = Failure("missing_file", "fetch", "\udcff.jpg: no such file")
    decoded = decode(encode(record))
    assert (decoded.id, decoded.images[0].source, decoded.kept) == ("a\ufffd", "\ufffd.jpg", {"x\ufffd": ["😀"]})
    assert decoded.error == Failure("missing_file", "fetch", "\ufffd.jpg: no such file")


def test_a_type_that_arrow_never_returns_is_rejected() -> None:
    with pytest.raises(TypeError, match="a kept column holds a complex"):
        encode(sample(0, kept={"x": 1j}))


def test_a_batch_has_every_column() -> None:
    ok = sample(5, id=5, responses=["one", "two"])
    [first, second] = to_batch([ok, failed(6, id=None)], schema("int64")).to_pylist()
    image = {"source": "5.jpg", "sha256": ok.images[0].sha256, "width": 640, "height": 480, "bytes": 1234}
    error = {"code": "missing_file", "stage": "fetch", "message": "6.jpg: no such file", "retryable": False}
    assert first["images"] == [image]
    assert (first["id"], first["responses"], first["error"]) == (5, ["one", "two"], None)
    assert second["error"] == error
    assert (second["response"], second["images"], second["attempts"]) == (None, [], 1)


def test_a_value_of_the_wrong_type_becomes_null_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    kept = pa.schema([("n", pa.int64())])
    with caplog.at_level(logging.WARNING):
        batch = to_batch([sample(0, kept={"n": 1}), sample(1, kept={"n": "x"}), sample(2)], schema(None, kept))
    assert batch["n"].to_pylist() == [1, None, None]
    assert "column n: 1 values" in caplog.text


def test_counts_add_up() -> None:
    counts = Counts(1, {"a": 2})
    counts.add(Counts(3, {"a": 1, "b": 1}))
    assert (counts, counts.rows, counts.failures) == (Counts(4, {"a": 3, "b": 1}), 8, 4)
    assert Record(0, "ok").kept is not Record(1, "ok").kept
