"""Every target judged by the oracle, which reads files itself; what is written in integers, read back by the loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conversion_oracle import blocks_not_in_fp8, check_certificate, values
from helpers import DENSE_SETTINGS, GOLDENS, V4_SETTINGS, sampled
from test_convert_load import made

from dsjax.checkpoint.load import load
from dsjax.config import load_config
from dsjax.convert import TARGETS
from dsjax.params import EXPERT, LINEAR, leaves, table
from dsjax.synth import synth_config, synthesise
from quant import QArray, dequantise

INTEGERS = ("int8-channel", "int8-block", "int4-group", "w4a8")
QUICK = sampled(tuple(name for name in TARGETS if name != "mxfp4"), 3, 90)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A V3 in FP8 with float32 scales, a V4 in FP4 and FP8, a dense model in BF16."""
    folder = tmp_path_factory.mktemp("sources")
    settings = {**V4_SETTINGS, "moe_intermediate_size": 160, "n_routed_experts": 4}
    synthesise(folder / "v4", synth_config("deepseek-v4-flash", layers=3, settings=settings))
    synthesise(folder / "dense", synth_config("deepseek-r1-distill-qwen-1.5b", layers=2, settings=DENSE_SETTINGS))
    return {"v3": GOLDENS / "v3-fp8-partial", "v4": folder / "v4", "dense": folder / "dense"}


@pytest.mark.parametrize("to", [t if t in QUICK else pytest.param(t, marks=pytest.mark.full) for t in TARGETS])
def test_certificates(to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Hashes, formats, exactness, errors of every tensor; FP4 is not exact in FP8 where no power of two would be."""
    for name, source in sources.items():
        if to == "mxfp4" and name != "v4":
            continue
        certificate = made(source, tmp_path / name, to)
        assert check_certificate(source, tmp_path / name) == []
        for tensor, one in certificate["tensors"].items():
            if one["source"]["format"] == "e2m1" and one["target"]["format"] == "e4m3":
                assert one["exact"] == (not blocks_not_in_fp8(source, tensor)), tensor


@pytest.mark.parametrize("to", INTEGERS)
def test_integers_are_loaded(to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """What `convert` writes, `load` reads: the values that the oracle finds in the files, in the format asked for."""
    for name in ("v3", "dense"):
        out = tmp_path / name
        made(sources[name], out, to)
        config, params, _ = load(out)
        assert config.quantization is not None
        held = {row.path: leaf for row, leaf in leaves(params, load_config(out))}
        checked = 0
        for row in table(config):
            if row.storage not in (LINEAR, EXPERT) or row.path not in held:
                continue
            leaf = held[row.path]
            assert isinstance(leaf, QArray) and leaf.format.name == ("int8" if "int8" in to else "int4")
            found = np.asarray(dequantise(leaf))
            for index, tensor in row.tensors():
                np.testing.assert_array_equal(found[index], np.float32(values(out, tensor)))
                checked += 1
        assert checked > 5
