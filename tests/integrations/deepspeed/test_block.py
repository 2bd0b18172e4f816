"""The block of the config: what it may hold, and what is said of anything else."""

from __future__ import annotations

import base64
import json
from argparse import Namespace

import pytest

pytest.importorskip("deepspeed")

from sparse_comm.integrations.deepspeed.block import Block, read_block, whole_config

BLOCK = {"masks": "masks.safetensors"}


def test_a_block_is_enabled_unless_it_says_not():
    assert read_block({"sparse_comm": BLOCK}) == Block("masks.safetensors")
    assert read_block({"sparse_comm": {**BLOCK, "enabled": True, "weights": "transient"}}) == Block(
        "masks.safetensors", "transient"
    )
    assert read_block({"sparse_comm": {**BLOCK, "enabled": False}}) is None
    assert read_block({"sparse_comm": {"enabled": False}}) is None
    assert read_block({"train_batch_size": 8}) is None


@pytest.mark.parametrize(
    "block, said",
    [
        ({**BLOCK, "weigths": "cached"}, "unknown key 'weigths'; did you mean 'weights'?"),
        ({**BLOCK, "mask": "x"}, "unknown key 'mask'; did you mean 'masks'?"),
        (
            {**BLOCK, "zzz": 1},
            "unknown key 'zzz'; it knows masks, weights, pipeline_codec, enabled",
        ),
        ({**BLOCK, "enabled": False, "zzz": 1}, "unknown key 'zzz'"),
        ({**BLOCK, "enabled": "true"}, "'enabled' must be true or false, got 'true'"),
        ({**BLOCK, "enabled": 1}, "'enabled' must be true or false, got 1"),
        ({}, "'masks' must be the path of a file .* got None"),
        ({"masks": 3}, "'masks' must be the path of a file .* got 3"),
        ({**BLOCK, "weights": "cache"}, "got 'cache'; did you mean 'cached'?"),
        (
            {**BLOCK, "pipeline_codec": "zip"},
            "'pipeline_codec' must be one of 'auto', .* got 'zip'",
        ),
        ({**BLOCK, "weights": 1}, "'weights' must be 'cached' or 'transient', got 1"),
        ("masks.safetensors", "must be an object such as .* got 'masks.safetensors'"),
        (True, "must be an object such as .* got True"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_that_is_right(block, said):
    with pytest.raises(ValueError, match=f"the block 'sparse_comm' .*{said}".replace("?", r"\?")):
        read_block({"sparse_comm": block})


@pytest.mark.parametrize("name", ["sparse_com", "sparse-comm", "sparsecomm", "sparse_comms"])
def test_a_misspelt_block_is_not_passed_over(name):
    with pytest.raises(ValueError, match=f"block '{name}', which nothing reads"):
        read_block({name: BLOCK})


def test_the_config_is_found_wherever_deepspeed_finds_it(tmp_path):
    config = {"train_batch_size": 8, "sparse_comm": BLOCK}
    text = json.dumps(config)
    path = tmp_path / "ds.json"
    path.write_text(text)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    none = (None, None)
    assert whole_config(None, config, None) is config
    assert whole_config(None, None, config) is config
    for given in (str(path), encoded):
        assert whole_config(None, given, None) == config
    assert whole_config(Namespace(deepspeed_config=str(path)), *none) == config
    assert whole_config(Namespace(deepspeed_config=None), *none) is None
    assert whole_config(Namespace(), *none) is None
    with pytest.raises(ValueError, match="Expected a string path"):
        whole_config(None, "nowhere.json", None)
