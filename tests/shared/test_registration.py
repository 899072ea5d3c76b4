"""Registration adds real members to PEFT's tables, once, and does not take what others hold."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_reslora
from peft_reslora import MoRAConfig, MoRAModel, ResLoRAConfig, ResLoRAModel, registration

TUNERS = {"RESLORA": (ResLoRAConfig, ResLoRAModel, "lora_"), "MORA": (MoRAConfig, MoRAModel, "mora_")}


@pytest.mark.parametrize("name", TUNERS)
def test_the_type_is_a_member_like_any_other(name):
    member = PeftType[name]
    assert member is getattr(PeftType, name) is PeftType(name)
    assert member in list(PeftType)
    assert (member.name, member.value, str.__str__(member)) == (name, name, name)
    assert isinstance(member, PeftType)
    assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize("name", TUNERS)
def test_the_tables_know_the_tuner(name):
    config, model, prefix = TUNERS[name]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[name] is model
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == prefix
    assert config().peft_type is PeftType[name]


def test_registering_again_changes_nothing():
    members, tables = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    registration.register()
    importlib.reload(peft_reslora)
    assert list(PeftType) == members
    assert tables == PEFT_TYPE_TO_TUNER_MAPPING


def test_a_name_that_another_package_holds_is_not_taken():
    class Other(LoraConfig):
        pass

    with pytest.raises(ValueError, match=r"already has a method called 'RESLORA', held by .*ResLoRAConfig.*Other"):
        registration.register_tuner("RESLORA", Other, ResLoRAModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["RESLORA"] is ResLoRAConfig


@pytest.mark.parametrize("version", ["0.19.1", "0.20.0", "0.22.0", "0.22.0.dev0", "0.22.0rc1", "1.0.0"])
def test_an_untested_peft_is_refused_with_the_way_out(version):
    with pytest.raises(ImportError, match=rf"peft {version} is installed.*pip install 'peft>=0.21.0,<0.22.0'"):
        registration.check_peft_version(version)


@pytest.mark.parametrize("version", ["4.57.6", "5.24.0", "5.24.0.dev0", "6.0.0"])
def test_an_untested_transformers_is_refused_with_the_way_out(version):
    """5.24 would refuse PEFT below 0.22 in `add_adapter`, after the model has been loaded."""
    way_out = "Look for a newer peft_reslora" if version != "4.57.6" else "Install"
    with pytest.raises(
        ImportError,
        match=rf"transformers {version} is installed\. {way_out}.*pip install 'transformers>=5.0.0,<5.24.0'",
    ):
        registration.check_transformers_version(version)


@pytest.mark.parametrize("version", ["5.0.0", "5.23.0", "5.23.1.dev0"])
def test_tested_versions_are_taken(version):
    registration.check_transformers_version(version)
    registration.check_peft_version("0.21.2")


def test_importing_the_package_is_enough():
    code = "import peft_reslora; from peft import PeftType; print(PeftType.RESLORA.value, PeftType.MORA.value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["RESLORA", "MORA"]


def test_the_public_names_are_those_of_the_documentation():
    assert all(hasattr(peft_reslora, name) for name in peft_reslora.__all__)
    assert {"ResLoRAConfig", "ResLoRAModel", "MoRAConfig", "MoRAModel", "describe_chains", "export_lora"} <= set(
        peft_reslora.__all__
    )
