from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.load import dump, load
from megatron_moe.config.run import RunConfig
from megatron_moe.config.synonyms import SETTING_OF
from megatron_moe.errors import ConfigError

MINIMAL = """
run: {dir: runs/x}
source: {path: models/tiny}
moe: {num_moe_experts: 8}
data: {path: text.jsonl}
train: {steps: 10}
optimizer:
  lr: 3e-4
parallel:
  expert_parallel_size: 2
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win_over_the_file(yaml_file: Path):
    config = load(RunConfig, yaml_file, ["parallel.expert_parallel_size=4", "run.dir=runs/y"])
    assert config.optimizer.lr == 3e-4
    assert config.parallel.expert_parallel_size == 4
    assert config.run.dir == Path("runs/y")


def test_a_dumped_configuration_loads_back_to_the_same(yaml_file: Path, tmp_path: Path):
    config = load(RunConfig, yaml_file, ["moe.moe_layers=[0, 2]"])
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.expert_paralel_size=4", "did you mean 'expert_parallel_size'"),
        ("parralel.expert_parallel_size=4", "parralel is not a setting; did you mean 'parallel'"),
        ("parallel.expert_parallel_size=two", "parallel.expert_parallel_size is 'two', must be"),
        ("parallel.expert_parallel_size='2'", "is '2', must be an integer"),
        ("parallel.expert_parallel_size=0", "must be greater than or equal to 1"),
        ("moe.router_order=softmax", "must be one of 'topk_softmax' or 'softmax_topk'"),
        ("moe.moe_layers=some", "moe.moe_layers is 'some'"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("dense.path=models/x", "dense is not a section; it is called source now"),
        (
            "optimizer.learning_rate=1",
            r"learning_rate is not a setting; did you mean optimizer\.lr\?",
        ),
        ("learning_rate=1", r"^learning_rate is not a setting; did you mean optimizer\.lr\?"),
        ("moe.num-experts=4", r"did you mean moe\.num_moe_experts\?"),
        ("train.max_steps=4", r"did you mean train\.steps\?"),
        ("data.sequence_length=4", r"did you mean data\.seq_length\?"),
        ("source.model_path=x", r"did you mean source\.path\?"),
        (
            "optimizer.lr_multipliers={routr: 5}",
            "^optimizer.lr_multipliers has the name 'routr', must be one of 'router', 'experts'",
        ),
        ("train.freeze=[attention@]", "^train.freeze.0 is 'attention@', must be one of 'router'"),
        ("train.freeze=[attention@3-1]", "with layers such as 'attention@0-3'$"),
        ("train.freeze=[attention@99999]", "is 'attention@99999', must be one of"),
        ("train.freeze=[7]", "^train.freeze.0 is 7, must be text$"),
        ("optimizer.lr_multipliers={layers@0: 5}", "has the name 'layers@0', must be one of"),
        ("optimizer.weight_decay_multipliers={nrms: 5}", "_multipliers has the name 'nrms'"),
        ("run.dir=null", "^run.dir is null, must be a path$"),
        ("data.path=7", "^data.path is 7, must be a path$"),
        ("upcycle.mix_with=models/x", "upcycle.mix_with is 'models/x', must be a list"),
        ("train.steps=null", "^train.steps is null, must be an integer$"),
        ("optimizer.use_distributed_optimizer=3", "is 3, must be true or false$"),
        ("optimizer.lr=true", "^optimizer.lr is true, must be a number$"),
        ("optimizer.lr_multipliers=5", "is 5, must be a mapping of names to values$"),
        ("run.seed", "not of the form key.path=value"),
        ("run.dir.x=1", "dir is a value, not a section"),
    ],
)
def test_mistakes_are_named(yaml_file: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, yaml_file, [override])


def test_synonyms_name_settings_that_exist():
    for name, setting in SETTING_OF.items():
        model: Any = RunConfig
        *sections, leaf = setting.split(".")
        for section in sections:
            model = model.model_fields[section].annotation
        assert leaf in model.model_fields, setting
        assert name not in model.model_fields, f"{name} is a setting itself"


def test_a_mistake_in_a_domain_is_named(yaml_file: Path):
    domains = "data.domains={wiki: {path: a, wieght: 1}, code: {weight: 1}}"
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, yaml_file, [domains])
    assert str(caught.value).splitlines() == [
        "data.domains.wiki.wieght is not a setting; did you mean 'weight'?",
        "data.domains.code.path must be set",
    ]


def test_all_mistakes_come_at_once(yaml_file: Path):
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, yaml_file, ["train.steps=-1", "data.sequence=3"])
    assert "train.steps" in str(caught.value)
    assert "data.sequence" in str(caught.value)


def test_a_required_setting_must_be_set(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("run: {}\n")
    with pytest.raises(ConfigError, match=r"run\.dir must be set"):
        load(RunConfig, tmp_path / "run.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_what_is_no_configuration_is_said(tmp_path: Path, text: str):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(RunConfig, tmp_path / "run.yaml")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load(RunConfig, tmp_path / "none.yaml")
