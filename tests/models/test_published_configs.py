"""The config.json of the most used models of the families that are read: each is what transformers
reads in it, of the published number of parameters, or refused by a field's name.

tests/data/published_configs.json has their keys and values: those of a family, and what a model has
of its own. No weights are made.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.models.tiny_models import ROW_OF

FILE = Path(__file__).parents[1] / "data" / "published_configs.json"
PUBLISHED = json.loads(FILE.read_text(encoding="utf-8"))
ROWS = {name: row for row in ROW_OF.values() for name in row.classes}


def config_of(name: str) -> dict:
    model = PUBLISHED["models"][name]
    return PUBLISHED["families"][model["family"]] | model["config"]


def test_they_are_forty_or_more_of_every_model_type_that_was_there():
    assert len(PUBLISHED["models"]) >= 40
    assert {model["family"] for model in PUBLISHED["models"].values()} == set(PUBLISHED["families"])


@pytest.mark.parametrize("name", PUBLISHED["models"])
def test_a_published_config_is_what_transformers_reads_or_is_refused_by_name(name):
    config, model = config_of(name), PUBLISHED["models"][name]
    row = ROWS[config["model_type"]]
    read = row.networks.Config.from_dict
    if refused := model.get("refused"):
        with pytest.raises(ValueError, match=f"^{refused} = "):
            read(config)
        return
    config_class = row.classes[config["model_type"]][0]
    given = {key: value for key, value in config.items() if key != "model_type"}
    theirs = config_class.from_dict(json.loads(json.dumps(given))).to_dict()
    assert read(config) == read(theirs)
    if "parameters" in model:
        with torch.device("meta"):
            network = row.networks.Network(read(config), 1, batch=0)
        assert sum(parameter.numel() for parameter in network.parameters()) == model["parameters"]


def test_extended_models_reach_what_their_readmes_say():
    for name in ("Qwen/Qwen3-8B", "Qwen/Qwen2.5-32B-Instruct"):
        config = config_of(f"{name}, as its README extends it")
        row = ROWS[config["model_type"]]
        assert row.networks.Config.from_dict(config).max_position_embeddings == 131_072
