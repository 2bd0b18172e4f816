"""``compare_comm.py --pipeline`` trains alike however it sends, and its peers are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lz4")

from scripts.lib.pipeline_kinds import BF16, EXACT, KINDS, LZ4, NOTHING, SAME_WAY, ZLIB, codec_of
from scripts.lib.pipeline_models import ALL, IMAGES, MODELS, stages
from sparse_comm.pipeline import decode, encode

SCRIPT = Path(__file__).parent.parent / "scripts" / "compare_comm.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compare")
    options = ("--pipeline", "--quick", "--models", "GPT", "--links", "loopback")
    command = [sys.executable, str(SCRIPT), *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.alone
def test_every_side_stands_in_the_table(written):
    facts = json.loads((written / "pipeline.json").read_text())
    kinds = [kind for kind in KINDS if kind != BF16]
    assert [row["kind"] for row in facts["rows"]] == kinds
    text = (written / "pipeline.md").read_text()
    assert all(f"| {kind} |" in text or f"| **{kind}** |" in text for kind in kinds)
    assert (written / "pipeline.png").stat().st_size > 10_000
    assert all(verdict["reached"] for verdict in facts["targets"])


@pytest.mark.alone
def test_exact_sides_train_alike_and_count_their_bytes(written):
    rows = {row["kind"]: row for row in json.loads((written / "pipeline.json").read_text())["rows"]}
    assert all(rows[kind]["difference"] == 0 for kind in EXACT)
    assert rows[NOTHING]["difference"] > 0
    dense = rows[SAME_WAY]
    assert dense["dense"] > 0
    assert dense["dense"] <= dense["forward"] < 1.01 * dense["dense"]
    assert rows[ZLIB]["forward"] < rows[LZ4]["forward"] <= 1.01 * dense["dense"]


@pytest.mark.parametrize("kind", [LZ4, ZLIB])
def test_peers_compress_without_loss(kind):
    x = torch.relu(torch.randn(64, 100)).bfloat16()
    message, _ = encode([x, torch.randn(50)], codec_of(kind))
    received, _ = decode(message, codec=codec_of(kind))
    assert torch.equal(received[0], x)
    assert message.numel() < x.nbytes


def test_a_peer_rounds_to_bf16():
    x = torch.randn(64, 100)
    message, _ = encode([x, torch.arange(3)], codec_of(BF16))
    received, _ = decode(message, codec=codec_of(BF16))
    assert torch.equal(received[0], x.bfloat16().float())
    assert torch.equal(received[1], torch.arange(3))
    assert message.numel() < 0.55 * x.nbytes


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_the_model(name):
    """Cut in any number of stages."""
    model = ALL[name]
    torch.manual_seed(0)
    layers = model.layers()
    x = torch.randn(2, 1, 28, 28) if name in IMAGES else torch.zeros(2, 64, dtype=torch.int64)
    outputs = []
    for count in model.cuts:
        given = (x,)
        for stage in stages(model, layers, count):
            out = stage(*given)
            given = out if isinstance(out, tuple) else (out,)
        outputs.append(given[0])
    assert all(torch.equal(out, outputs[0]) for out in outputs)
