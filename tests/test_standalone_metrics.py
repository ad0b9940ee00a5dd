"""What verify.py decodes and measures, against ml_dtypes and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bundles import CODES, save_tensors
from scipy import stats
from scipy.special import log_softmax, rel_entr, softmax

from dsjax.export.standalone.arrays import BadInput, Stored, read_arrays
from dsjax.export.standalone.errors import distance, float_errors, judge, logits_errors


def test_every_dtype(tmp_path: Path) -> None:
    """All values of all types as ml_dtypes has them, to the bit."""
    for name, code in CODES.items():
        dtype = np.dtype(name)
        bits = np.arange(256, dtype=np.uint8) if dtype.itemsize == 1 else np.arange(1 << 16, dtype=np.uint16)
        array = (bits[:2].repeat(2) if name == "bool" else bits.view(np.uint8)).view(dtype).reshape(2, -1)
        save_tensors(tmp_path / "x.safetensors", {"x": array, "empty": array[:0], "scalar": array[0, 1]})
        found = read_arrays(tmp_path / "x.safetensors")
        assert found["x"].code == code and found["scalar"].shape == () and found["empty"].shape == (0, array.shape[1])
        wanted = array.astype(np.float32) if dtype.kind == "V" or name == "bfloat16" else array
        for value, expected in ((found["x"].values(), wanted), (found["scalar"].values(), wanted[0, 1])):
            assert value.dtype == wanted.dtype
            np.testing.assert_array_equal(value, expected)
        assert Stored.of(array).code == code
        np.testing.assert_array_equal(Stored.of(array).values(), wanted)


def test_metrics_against_scipy() -> None:
    r = np.random.default_rng(3)
    a = r.normal(2, 1, size=(6, 40)).astype(np.float32)
    b = (a + r.normal(0, 0.3, size=a.shape)).astype(np.float32)
    x, y = a.astype(np.float64), b.astype(np.float64)
    found = float_errors(a, b)
    assert found["max_abs"] == pytest.approx(np.abs(x - y).max())
    assert found["max_relative"] == pytest.approx(np.linalg.norm((x - y).ravel(), np.inf) / np.abs(x).max())
    assert found["norm"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    assert found["mean_relative"] == pytest.approx(np.linalg.norm((x - y).ravel(), 1) / np.linalg.norm(x.ravel(), 1))
    assert found["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert found["pcc"] == pytest.approx(stats.pearsonr(x.ravel(), y.ravel()).statistic)
    assert found["pcc"] != pytest.approx(found["cosine"], rel=1e-3)  # the mean is not zero

    logits = logits_errors(a, b)
    kl = rel_entr(softmax(x, -1), softmax(y, -1)).sum(-1)
    assert logits["kl_mean"] == pytest.approx(kl.mean()) and logits["kl_max"] == pytest.approx(kl.max())
    tops = [set(np.argsort(-u)[:5]) & set(np.argsort(-v)[:5]) for u, v in zip(x, y, strict=True)]
    assert logits["top5"] == pytest.approx(np.mean([len(t) / 5 for t in tops]))
    assert logits["top1"] == pytest.approx((x.argmax(-1) == y.argmax(-1)).mean())
    assert logits["rows"] == 6 and 0 < logits["top5"] < 1


def test_metrics_of_large_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large arrays are gone through in parts; the same numbers come out."""
    r = np.random.default_rng(4)
    a, b = (r.normal(5, 1, size=(50, 30)).astype(np.float32) for _ in range(2))
    whole = [float_errors(a, b), logits_errors(a, b)]
    monkeypatch.setattr("dsjax.export.standalone.errors._CHUNK", 64)
    for one, other in zip(whole, [float_errors(a, b), logits_errors(a, b)], strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_metrics_at_the_edges() -> None:
    zeros, ones, empty = np.zeros(4, np.float32), np.ones(4, np.float32), np.zeros(0, np.float32)
    assert distance(zeros, zeros) == 0 and distance(zeros, ones) == np.inf and distance(empty, empty) == 0
    assert distance(ones, zeros) == 1 and np.isnan(float_errors(ones, zeros)["cosine"])
    assert np.isnan(float_errors(ones * np.float32(0.1), ones)["pcc"])  # constants have no correlation
    huge = np.full(3, 3e38, np.float32)
    assert distance(huge, -huge) == pytest.approx(2)  # no overflow

    masked = np.array([[0, 1, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf]])
    other = np.array([[0, 2, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf]])
    found = logits_errors(masked, other)
    p, q = log_softmax([0, 1]), log_softmax([0, 2])
    assert found["kl_mean"] == pytest.approx((np.exp(p) * (p - q)).sum()) and found["top5"] == 1
    assert logits_errors(np.zeros((1, 3)), np.full((1, 3), np.nan))["rows"] == 0
    assert judge("x.logits", Stored.of(zeros), Stored.of(zeros), 0.05, 0)["logits"]["top1"] == 1
    with pytest.raises(BadInput, match="numbers"):
        Stored.of(np.array(["text"]))
