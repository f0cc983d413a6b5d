from __future__ import annotations

import pytest

from pytest_repro.fingerprint import Change, class_of, diff, equal_count


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        *[(n, "identity") for n in ("model.weights", "model.config", "tokenizer", "chat_template", "generation")],
        *[(n, "numerics") for n in ("batch_size", "torch", "driver", "attention", "cpu_capability", "quantization")],
        ("env.OMP_NUM_THREADS", "numerics"),
        ("engine.scheduler", "numerics"),
        ("time", "information"),
        ("commit", "information"),
        ("environment", "information"),
        ("something_new", "information"),
    ],
)
def test_class_of(name: str, cls: str) -> None:
    assert class_of(name) == cls


def test_diff_lists_identity_then_suspects_by_likelihood_then_information() -> None:
    names = [
        "time",
        "commit",
        "cpu_model",
        "env.MKL_CBWR",
        "torch",
        "driver",
        "batch_size",
        "host",
        "tokenizer",
        "model.weights",
    ]
    found = [c.field for c in diff(dict.fromkeys(names, 1), dict.fromkeys(names, 2))]
    assert found == [
        "model.weights", "tokenizer",
        "batch_size", "driver", "torch", "cpu_model", "env.MKL_CBWR",
        "commit", "host", "time",
    ]  # fmt: skip


def test_diff_tells_both_values_and_what_only_one_side_has() -> None:
    found = diff({"batch_size": 8, "torch": "2.13", "threads": 2}, {"batch_size": 1, "threads": 2, "attention": "sdpa"})
    assert found == [
        Change("batch_size", "numerics", 8, 1),
        Change("attention", "numerics", None, "sdpa"),
        Change("torch", "numerics", "2.13", None),
    ]


def test_a_field_that_is_null_is_one_that_is_not_there() -> None:
    assert diff({"driver": None, "dtype": "bf16"}, {"dtype": "bf16"}) == []


def test_equal_count_leaves_information_out() -> None:
    golden = {"torch": "2.13", "batch_size": 8, "tokenizer": "t", "time": "now", "driver": "1"}
    assert equal_count(golden, {"torch": "2.13", "batch_size": 1, "tokenizer": "t", "time": "now"}) == 2
